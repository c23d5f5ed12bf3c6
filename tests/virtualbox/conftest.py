"""Tests beside a real VirtualBox run where `make test-virtualbox` or `make test-virtualbox-host` starts them."""

from __future__ import annotations

import os

WHERE = os.environ.get("VMWRAPPER_VIRTUALBOX", "")  # "interpreted": in the chroot; "host": with the kernel driver

collect_ignore = []
if WHERE:
    collect_ignore += ["test_fake.py"]  # run with all other tests
else:
    collect_ignore += ["test_real.py", "test_cycles.py", "test_network.py"]
if WHERE != "host":
    collect_ignore += ["test_host.py"]
