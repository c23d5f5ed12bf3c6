"""What VirtualBox needs on this host, each with its own sentence and next step."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Any

import attrs

from ..base import HypervisorError, Requirement
from .calls import Calls

HELLO_DEADLINE = 60.0  # seconds; VirtualBox's service takes one to start
OLDEST, NEWEST = (6, 1), (7, 2)
GROUP = "vboxusers"

if sys.platform != "win32":
    import grp
    import pwd


@attrs.frozen
class Host:
    """The places that are looked at; tests have others."""

    device: Path = Path("/dev/vboxdrv")
    modules: Path = Path("/proc/modules")
    processor: Path = Path("/proc/cpuinfo")


async def requirements(calls: Calls, host: Host | None = None) -> list[Requirement]:
    """Look at everything; never fails."""
    host = host or Host()
    try:
        hello: dict[str, Any] = await calls.call("hello", HELLO_DEADLINE)
    except HypervisorError as error:
        found = [Requirement("VirtualBox", False, str(error), error.hint)]
    else:
        found = [_version(hello), Requirement("pyvbox", True, f"works, with {hello['vboxapi']}")]
    if sys.platform == "linux":
        found += [kernel_driver(host.device), group_of_users(), virtualisation(host)]
    return found


def _version(hello: dict[str, Any]) -> Requirement:
    version = str(hello["version"])
    try:
        number = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        number = (0, 0)
    words = f"{version}, settings in {hello['home']}"
    if number < OLDEST:
        return Requirement("VirtualBox", False, f"{words}: too old", "install VirtualBox 7.2 (at least 6.1)")
    if number > NEWEST:
        remedy = "it may work; 6.1 to 7.2 are known"
        return Requirement("VirtualBox", False, f"{words}: newer than any known one", remedy, fatal=False)
    return Requirement("VirtualBox", True, words)


def kernel_driver(device: Path) -> Requirement:
    name = "VirtualBox driver"
    if not device.exists():
        remedy = "modprobe vboxdrv; build it with /sbin/vboxconfig (Debian: apt install virtualbox-dkms)"
        return Requirement(name, False, f"{device} is not there: the kernel driver is not loaded", remedy)
    status = device.stat()
    # The packaged programs open it as root; others do as the user, who then has to be in its group.
    if status.st_mode & stat.S_IRGRP and not os.access(device, os.R_OK | os.W_OK):
        remedy = f"usermod -aG {_group_name(status.st_gid)} {_user()}, then log in again"
        return Requirement(name, False, f"{device} may not be used by this user", remedy)
    return Requirement(name, True, str(device))


def group_of_users() -> Requirement:
    name = f"group {GROUP}"
    try:
        group = grp.getgrnam(GROUP)
    except KeyError:
        return Requirement(name, True, "this VirtualBox has none, and needs none")
    if os.getuid() == 0 or group.gr_gid in (*os.getgroups(), os.getgid()):
        return Requirement(name, True, "this user is a member")
    remedy = f"usermod -aG {GROUP} {_user()}, then log in again"
    return Requirement(
        name, False, f"the user {_user()} is not a member: no USB, and no VM in some set-ups", remedy, False
    )


def virtualisation(host: Host) -> Requirement:
    """VT-x or AMD-V: there, and not held by KVM at this moment."""
    name = "VT-x or AMD-V"
    try:
        flags = host.processor.read_text("ascii", "replace")
        modules = host.modules.read_text("ascii", "replace")
    except OSError as error:
        return Requirement(name, True, f"cannot be told: {error.strerror}")
    for line in modules.splitlines():
        words = line.split()
        if words[:1] in (["kvm_intel"], ["kvm_amd"]) and len(words) > 2 and words[2] != "0":
            remedy = f"end the VMs of QEMU or libvirt, then: modprobe -r {words[0]}"
            return Requirement(name, False, "held by KVM: a VM of another program runs", remedy)
    if not any(flag in flags.split() for flag in ("vmx", "svm")):
        remedy = "switch it on in the firmware's settings; under Windows, switch Hyper-V off; in a VM: nested VT-x"
        return Requirement(name, False, "the processor offers none, or something else keeps it", remedy)
    return Requirement(name, True, "is there")


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
