"""What this host needs for VMs: `vmctl doctor` shows it, and each host agent looks when it starts."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from twisted.internet.defer import CancelledError

from common.errors import VMwrapperError
from common.files import endpoints_dir

from .hypervisors.base import Hypervisor, Requirement

FREE_DISK_MB = 1024  # a VM's disk grows by what its guest writes, and each of its states is some 35 MB and more


async def look(hypervisor: Hypervisor, where: Path) -> list[Requirement]:
    """Everything; what cannot be looked at is not met. `where`: on which disk VMs would be."""
    try:
        theirs = await hypervisor.requirements()
    except CancelledError:
        raise
    except Exception as error:
        theirs = [Requirement(hypervisor.name, False, str(error) or repr(error))]
    return [runtime(), temporary(), disk(where), *theirs]


def runtime() -> Requirement:
    """The place for sockets."""
    try:
        return Requirement("runtime directory", True, str(endpoints_dir().parent))
    except (VMwrapperError, OSError) as error:
        remedy = getattr(error, "hint", "") or "set VMWRAPPER_RUNTIME to a directory of your own"
        return Requirement("runtime directory", False, str(error), remedy)


def temporary() -> Requirement:
    """The system's place for temporary files, which hypervisors use, too."""
    name = "temporary files"
    try:
        return Requirement(name, True, tempfile.gettempdir())
    except OSError as error:  # it has tried to write
        remedy = "chmod 1777 /tmp as root, or set TMPDIR to a directory that you may write to"
        return Requirement(name, False, error.strerror or str(error), remedy)


def disk(where: Path) -> Requirement:
    """Room for VMs."""
    try:
        free = shutil.disk_usage(where).free >> 20
        writable = os.access(where, os.W_OK | os.X_OK)
    except OSError as error:
        return Requirement("free disk", False, f"{where}: {error.strerror}", "use another directory", fatal=False)
    words = f"{free} MB in {where}" + ("" if writable else ", where this user may not write")
    remedy = "remove files, or let BOINC use another disk" if writable else "use another directory"
    return Requirement("free disk", free >= FREE_DISK_MB and writable, words, remedy, fatal=False)
