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

from .cpu_time import CpuTime
from .helper_process import HelperProcess, exit_status
from .qemu_options import KVM
from .refusal import Refusal

DEVICE = Path("/dev/kvm")
DEADLINE = 3.0  # seconds; where KVM works the probe ends within a tenth of one
AT_WORK = 1.0  # seconds of CPU time: a probe that has used less in all that time stood in a queue
GAVE_UP = "it gave up on a guest: "
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
    if why_not.startswith(GAVE_UP):
        return "start this computer anew, or let vmctl doctor look whether it works"
    return "end other hypervisors; a host that is itself a VM needs nested virtualisation; then: vmctl doctor"


class KvmProbe:
    """Asks once and remembers. What took long to find out, or cost a guest, the next host agents remember, too."""

    def __init__(self, reactor: Any, qemu: str, accelerator: tuple[str, ...] = KVM) -> None:
        self._reactor = reactor
        self._qemu = qemu
        self._accelerator = accelerator
        self._refusal = Refusal(qemu, accelerator)
        self._answer: str | None = None

    def why_not(self, anew: bool = False) -> Deferred[str]:
        """Fires with "" where the accelerator works, else with the reason. `anew`: nobody's memory counts."""
        if anew:
            self._answer = None
        if self._answer is None and self._accelerator is KVM:
            if not DEVICE.exists():
                self._answer = f"this host has no {DEVICE}"
            else:
                try:
                    DEVICE.open("r+b").close()
                except OSError as error:
                    self._answer = f"{DEVICE}: {error.strerror}"
        if self._answer is None and not anew:
            self._answer = self._refusal.read() or None
        if self._answer is not None:
            return succeed(self._answer)
        return self._boot().addCallback(self._remember, anew)

    def gave_up(self, words: str) -> None:
        """It passed the probe, and then did that to a guest: it gets no other one until this computer starts anew."""
        self._answer = f"{GAVE_UP}{words}"
        self._refusal.keep(self._answer)

    def _remember(self, ended: tuple[str, bool], anew: bool) -> str:
        answer, at_work = ended
        if self._answer is None:  # else a guest was quicker to show it
            self._answer = answer
            if at_work:
                self._refusal.keep(answer)
            elif anew and not answer:
                self._refusal.forget()
        return self._answer

    def _boot(self) -> Deferred[tuple[str, bool]]:
        """Why not, and whether it was at work until its time was over."""
        directory = tempfile.TemporaryDirectory(prefix="vmwrapper-kvm-")
        kernel = Path(directory.name) / "probe"
        kernel.write_bytes(_probe_kernel())
        argv = [self._qemu, *self._accelerator, "-M", "q35", "-m", "16", "-nodefaults", "-no-user-config"]
        argv += ["-display", "none", "-no-reboot", "-kernel", str(kernel)]
        argv += ["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"]
        probe = _Probe(self._reactor)
        self._reactor.spawnProcess(probe, argv[0], argv, env=None)

        def clean(ended: tuple[str, bool]) -> tuple[str, bool]:
            directory.cleanup()
            return ended

        return probe.ended.addCallback(clean)


class _Probe(HelperProcess):
    def __init__(self, reactor: Any) -> None:
        self.ended: Deferred[tuple[str, bool]] = Deferred()
        self._late = reactor.callLater(DEADLINE, self._too_late)
        self._at_work = False

    def _too_late(self) -> None:
        self._errors = f"a probe did not boot within {DEADLINE:.0f} s".encode()
        used = CpuTime().look(self.transport.pid if self.transport is not None else None)
        self._at_work = used >= AT_WORK
        self.kill()

    def processEnded(self, reason: Failure) -> None:
        if self._late.active():
            self._late.cancel()
        works = exit_status(reason) == _EXIT_STATUS
        answer = "" if works else (self.lines or ["a probe did not boot"])[0]
        self.ended.callback((answer, self._at_work and not works))
