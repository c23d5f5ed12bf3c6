"""The fake keeps to the drivers' contract, and fails as scripted."""

from __future__ import annotations

from pathlib import Path

import pytest
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from host_agent.hypervisors.base import Hypervisor, HypervisorError, MachineSpec, MachineState
from host_agent.hypervisors.fake import FakeHypervisor, FakeMachine, Script
from host_agent.hypervisors.images import Image

from .hypervisor_contract import HypervisorContract, Told, state_of


def an_image(directory: Path) -> Image:
    disk = directory / "disk.qcow2"
    disk.write_bytes(b"disk")
    return Image("fake", directory, "0" * 64, "x86_64", disk, None, None, "", 256)


class TestFakeHypervisor(HypervisorContract):
    def hypervisor(self) -> Hypervisor:
        from twisted.internet import reactor

        return FakeHypervisor(reactor)

    def image(self, request: pytest.FixtureRequest) -> Image:
        return an_image(request.getfixturevalue("tmp_path"))


def make(tmp_path: Path, script: Script) -> tuple[Clock, FakeMachine, Told]:
    clock, told = Clock(), Told()
    directory = tmp_path / "vm"
    directory.mkdir()
    spec = MachineSpec("vm", "i", an_image(tmp_path), directory, 256, 1, {}, b"", told)
    hypervisor = FakeHypervisor(clock, script)
    hypervisor.create(spec)
    return clock, hypervisor.machines[-1], told


def test_start_fails(tmp_path: Path) -> None:
    clock, machine, told = make(tmp_path, Script(start_fails="no memory"))
    failures: list[Failure] = []
    machine.start().addErrback(failures.append)
    clock.advance(1)
    assert failures[0].check(HypervisorError)
    assert "no memory" in failures[0].getErrorMessage()
    assert told.states == [MachineState.STARTING, MachineState.CRASHED]


def test_dies(tmp_path: Path) -> None:
    clock, machine, told = make(tmp_path, Script(dies_after=5.0, dies_of="killed"))
    machine.start()
    clock.advance(0)
    assert state_of(machine) is MachineState.RUNNING
    clock.advance(5)
    assert (told.states[-1], told.reasons[-1]) == (MachineState.CRASHED, "killed")
    assert machine.cpu_seconds() == pytest.approx(0.5)


def test_never_starts_and_is_powered_off(tmp_path: Path) -> None:
    clock, machine, _ = make(tmp_path, Script(start_takes=None))
    failures: list[Failure] = []
    machine.start().addErrback(failures.append)
    clock.advance(1000)
    assert state_of(machine) is MachineState.STARTING
    machine.power_off()
    clock.advance(0)
    assert state_of(machine) is MachineState.STOPPED
    assert failures


def test_guest_powers_itself_off(tmp_path: Path) -> None:
    clock, machine, _ = make(tmp_path, Script(powers_off_after=2.0))
    machine.start()
    clock.pump([0, 2])
    assert state_of(machine) is MachineState.STOPPED


def test_create_fails(tmp_path: Path) -> None:
    hypervisor = FakeHypervisor(Clock(), Script(create_fails="disk full"))
    failures: list[Failure] = []
    spec = MachineSpec("vm", "i", an_image(tmp_path), tmp_path, 256, 1, {}, b"", Told())
    hypervisor.create(spec).addErrback(failures.append)
    assert "disk full" in failures[0].getErrorMessage()
    assert hypervisor.machines == []
