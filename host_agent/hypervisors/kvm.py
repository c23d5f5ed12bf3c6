"""Do KVM, HVF or WHPX work here? Only a boot tells: `/dev/kvm` also opens where nested virtualisation then fails.

There are hosts, VMs themselves, whose KVM emulates the code of a guest's kernel, one instruction in half a microsecond,
and gives up on some of it after a while: a few instructions end well there, and Linux never boots. So the probe counts
for long enough that only processors that do it themselves are done in time.
"""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.python.failure import Failure

from .helper_process import HelperProcess, exit_status
from .qemu_options import KVM

DEVICE = Path("/dev/kvm")
DEADLINE = 3.0  # seconds; where KVM works the probe ends within a tenth of one
_TURNS = 1 << 25  # of its loop: a hundredth of a second on a processor, a sixth in QEMU's own emulation
_EXIT_STATUS = 33  # (0x10 << 1) | 1, as QEMU's isa-debug-exit device makes it


def _probe_kernel() -> bytes:
    """A multiboot kernel that counts down: out 0xf4, 0x10 then ends QEMU with a status that nothing else gives."""
    magic, flags, load = 0x1BADB002, 0x00010003, 0x100000
    header = struct.pack("<8I", magic, flags, -(magic + flags) & 0xFFFFFFFF, load, load, 0, 0, load + 32)
    code = b"\xb9" + struct.pack("<I", _TURNS) + b"\x49\x75\xfd"  # mov ecx, turns; dec ecx; jnz to dec
    code += b"\x66\xba\xf4\x00\xb0\x10\xee\xf4\xeb\xfd"  # mov dx,0xf4; mov al,0x10; out dx,al; hlt; jmp to hlt
    return (header + code).ljust(512, b"\0")


def remedy(why_not: str) -> str:
    """What a person can do about one of the reasons that a probe gives."""
    if why_not.startswith("this host has no"):
        return "switch on virtualisation in the firmware, then: modprobe kvm_intel, or kvm_amd"
    if why_not.startswith(str(DEVICE)):
        return "be a member of the group kvm, and log in anew"
    return "end other hypervisors; a host that is itself a VM needs nested virtualisation"


class KvmProbe:
    """Asks once and remembers. `why_not()` fires with "" where the accelerator works, else with the reason."""

    def __init__(self, reactor: Any, qemu: str, accelerator: tuple[str, ...] = KVM) -> None:
        self._reactor = reactor
        self._qemu = qemu
        self._accelerator = accelerator
        self._answer: str | None = None

    def why_not(self) -> Deferred[str]:
        if self._answer is None and self._accelerator is KVM:
            if not DEVICE.exists():
                self._answer = f"this host has no {DEVICE}"
            else:
                try:
                    DEVICE.open("r+b").close()
                except OSError as error:
                    self._answer = f"{DEVICE}: {error.strerror}"
        if self._answer is not None:
            return succeed(self._answer)
        return self._boot().addCallback(self._remember)

    def _remember(self, answer: str) -> str:
        self._answer = answer
        return answer

    def _boot(self) -> Deferred[str]:
        directory = tempfile.TemporaryDirectory(prefix="vmwrapper-kvm-")
        kernel = Path(directory.name) / "probe"
        kernel.write_bytes(_probe_kernel())
        argv = [self._qemu, *self._accelerator, "-M", "q35", "-m", "16", "-nodefaults", "-no-user-config"]
        argv += ["-display", "none", "-no-reboot", "-kernel", str(kernel)]
        argv += ["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"]
        probe = _Probe(self._reactor)
        self._reactor.spawnProcess(probe, argv[0], argv, env=None)

        def clean(answer: str) -> str:
            directory.cleanup()
            return answer

        return probe.ended.addCallback(clean)


class _Probe(HelperProcess):
    def __init__(self, reactor: Any) -> None:
        self.ended: Deferred[str] = Deferred()
        self._late = reactor.callLater(DEADLINE, self._too_late)

    def _too_late(self) -> None:
        self._errors = f"a probe did not boot within {DEADLINE:.0f} s".encode()
        self.kill()

    def processEnded(self, reason: Failure) -> None:
        if self._late.active():
            self._late.cancel()
        works = exit_status(reason) == _EXIT_STATUS
        self.ended.callback("" if works else (self.lines or ["a probe did not boot"])[0])
