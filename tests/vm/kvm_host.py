"""A host agent on a computer that has KVM as far as it can see: the device is the file `VMWRAPPER_TEST_KVM`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from host_agent.hypervisors import kvm
from host_agent.main import main

if __name__ == "__main__":
    kvm.DEVICE = Path(os.environ["VMWRAPPER_TEST_KVM"])
    sys.exit(main())
