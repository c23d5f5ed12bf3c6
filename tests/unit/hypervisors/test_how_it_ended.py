"""The end of a QEMU: a sentence about it, and what is seen of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock

from host_agent.hypervisors.base import HypervisorError, MachineState
from host_agent.hypervisors.qemu_machine import QemuMachine
from host_agent.hypervisors.qemu_options import HVF, KVM, TCG, WHPX
from host_agent.hypervisors.qemu_process import HowItEnded
from host_agent.hypervisors.qemu_states import States
from tests.contract.hypervisor_contract import Told

from .test_qemu_wiring import spec

AGENT_WAS_AWAY = (
    "qemu-system-x86_64: Unable to connect character device monitor: "
    "Failed to connect to '/run/qmp.sock': No such file or directory\n"
)


@pytest.mark.parametrize(
    ("status", "signal", "errors", "sentence"),
    [
        (1, 0, "qemu: could not open disk image\n", "QEMU ended with status 1: qemu: could not open disk image"),
        (0, 9, AGENT_WAS_AWAY, "QEMU was killed by signal 9"),
        (
            0,
            11,
            f"assertion failed\n{AGENT_WAS_AWAY}{AGENT_WAS_AWAY}",
            "QEMU was killed by signal 11: assertion failed",
        ),
        (0, 0, "", "QEMU ended with status 0"),
    ],
)
def test_the_last_words_that_have_to_do_with_it(status: int, signal: int, errors: str, sentence: str) -> None:
    assert str(HowItEnded(status, signal, errors, None)) == sentence


def test_who_waited_for_its_start_sees_what_has_become_of_it(tmp_path: Path) -> None:
    """A taking over goes on at once when the leash says that the saved VM has ended: it is not starting any more."""
    machine = QemuMachine(Clock(), spec(tmp_path), tmp_path / "place", States(tmp_path), 0.0)
    machine.state, machine._asked_to_end = MachineState.STARTING, MachineState.SAVED
    seen: list[MachineState] = []
    machine._ready = Deferred()
    machine._ready.addErrback(lambda _: seen.append(machine.state))
    machine._ended(HowItEnded(0, 0, "", 0.0))
    assert seen == [MachineState.SAVED]


FROM_NOW_ON = "; VMs are emulated from now on"
KVM_SAYS = """KVM internal error. Suberror: 1
extra data[0]: 0x0000000000000001
emulation failure
RAX=ffff888003c40040 RBX=0000000000000000
Code=24 5b 80 41 <f0> 48 0f c7 4d 20
"""


class Qemu:
    """A QEMU that runs, and its monitor: in `status`, or too late to say so."""

    pid, leash_pid = 1, None

    def __init__(self, machine: QemuMachine, status: str) -> None:
        self.machine, self.status = machine, status
        self.asked: list[str] = []
        self.says = ""
        self.answer: Deferred[dict[str, str]] | None = None  # one that is to come

    def share(self, share: float) -> None:
        pass

    def execute(self, command: str, **_: Any) -> Deferred[Any]:
        self.asked.append(command)
        if command == "quit":
            self.machine._ended(HowItEnded(0, 0, self.says, 0.0))
        elif not self.status:
            return fail(HypervisorError("QEMU has ended"))
        return self.answer or succeed({"status": self.status})


def running(place: Path, status: str) -> tuple[QemuMachine, Qemu, Told]:
    told = Told()
    machine = QemuMachine(Clock(), attrs.evolve(spec(place), on_state=told), place / "place", States(place), 0.0)
    qemu = Qemu(machine, status)
    machine._process, machine._qmp = qemu, qemu  # type: ignore[assignment]
    machine.state = MachineState.RUNNING
    return machine, qemu, told


@pytest.mark.parametrize(
    ("accelerator", "status", "says", "sentence", "words"),
    [
        (
            KVM,
            "internal-error",
            KVM_SAYS,
            f"KVM gave up on the guest (KVM internal error. Suberror: 1, emulation failure){FROM_NOW_ON}",
            "KVM internal error. Suberror: 1, emulation failure",
        ),
        (
            KVM,
            "internal-error",
            "error: kvm run failed Bad address\nRAX=0\n",
            f"KVM gave up on the guest (error: kvm run failed Bad address){FROM_NOW_ON}",
            "error: kvm run failed Bad address",
        ),
        (
            HVF,
            "internal-error",
            "RAX=0\n",
            f"HVF gave up on the guest (internal error){FROM_NOW_ON}",
            "internal error",
        ),
        (
            WHPX,
            "internal-error",
            "WHPX: Unexpected VP exit code 4\n",
            f"WHPX gave up on the guest (WHPX: Unexpected VP exit code 4){FROM_NOW_ON}",
            "WHPX: Unexpected VP exit code 4",
        ),
        (TCG, "internal-error", AGENT_WAS_AWAY, "QEMU gave up on the guest (internal error)", None),
        (TCG, "internal-error", "no way on\n", "QEMU gave up on the guest (no way on)", None),
        (KVM, "guest-panicked", KVM_SAYS, "the guest's kernel failed or restarted", None),
    ],
)
def test_a_guest_that_qemu_has_stopped_for_good(
    tmp_path: Path, accelerator: tuple[str, ...], status: str, says: str, sentence: str, words: str | None
) -> None:
    """It has crashed; when it was the accelerator's doing, this VM and its host are told to do without."""
    machine, qemu, told = running(tmp_path, status)
    machine.accelerator, qemu.says = accelerator, says
    gave_up: list[str] = []
    machine.gave_up = gave_up.append
    machine.monitor_event("STOP", {})
    assert qemu.asked == ["query-status", "quit"]
    assert (told.states, told.reasons) == ([MachineState.CRASHED], [sentence])
    assert gave_up == ([words] if words else [])
    assert machine.accelerator == (TCG if words else accelerator)


@pytest.mark.parametrize(
    ("status", "reasons"),
    [
        ("paused", ["QEMU stopped the guest (paused)"]),  # whoever did: it is let go on, as after a full disk
        ("running", []),  # it goes on already
        ("", []),  # the leash tells of its end
    ],
)
def test_a_stop_that_nobody_asked_for(tmp_path: Path, status: str, reasons: list[str]) -> None:
    machine, _, told = running(tmp_path, status)
    machine.monitor_event("STOP", {})
    assert told.reasons == reasons
    assert machine.state is (MachineState.PAUSED if reasons else MachineState.RUNNING)


def test_a_full_disk_is_no_end(tmp_path: Path) -> None:
    machine, _, told = running(tmp_path, "io-error")
    machine.monitor_event("BLOCK_IO_ERROR", {"action": "stop", "nospace": True, "reason": "No space left"})
    machine.monitor_event("STOP", {})
    assert (told.states, told.reasons) == ([MachineState.PAUSED], ["this computer's disk is full: No space left"])


def test_a_stop_of_our_own(tmp_path: Path) -> None:
    """An operation was under way, or begins before QEMU has said why: who does it tells of it."""
    machine, qemu, told = running(tmp_path, "paused")
    for busy in (True, False):
        qemu.answer = Deferred()
        machine._busy = busy
        machine.monitor_event("STOP", {})
        machine._busy = not busy
        qemu.answer.callback({"status": "paused"})
        assert told.states == []
    qemu.answer, qemu.status = None, "internal-error"
    machine.monitor_event("STOP", {})
    assert told.states == [MachineState.CRASHED], "but it may be the end of the guest all the same"


def test_who_waits_for_a_template_hears_of_its_end(tmp_path: Path) -> None:
    machine, _, _ = running(tmp_path, "internal-error")
    waiting = machine._host_line.guest_waits()
    machine.monitor_event("STOP", {})
    failed: list[str] = []
    waiting.addErrback(lambda failure: failed.append(failure.getErrorMessage()))
    assert failed == [f"the VM {machine.spec.name} ended: QEMU gave up on the guest (internal error)"]
