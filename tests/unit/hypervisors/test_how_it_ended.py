"""The end of a QEMU: a sentence about it, and what is seen of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from host_agent.hypervisors.base import MachineState
from host_agent.hypervisors.qemu_machine import QemuMachine
from host_agent.hypervisors.qemu_process import HowItEnded
from host_agent.hypervisors.qemu_states import States

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
