"""Tests beside a real VirtualBox run where `make test-virtualbox` or `make test-virtualbox-host` starts them."""

from __future__ import annotations

import os
import subprocess

import pytest

WHERE = os.environ.get("VMWRAPPER_VIRTUALBOX", "")  # "interpreted": in the chroot; "host": with the kernel driver

collect_ignore = []
if WHERE:
    collect_ignore += ["test_fake.py", "test_troubles.py"]  # run with all other tests
else:
    collect_ignore += ["test_real.py", "test_cycles.py", "test_network.py"]
if WHERE != "host":
    collect_ignore += ["test_host.py"]


@pytest.fixture(scope="session", autouse=True)
def _guests_may_be_interpreted() -> None:
    """Where there is no kernel driver; where there is one, it makes no difference."""
    if WHERE:
        asked = ["VBoxManage", "setextradata", "global", "VBoxInternal/HM/FallbackToIEM", "1"]
        subprocess.run(asked, check=True, capture_output=True, timeout=60)
