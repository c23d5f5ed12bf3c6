"""What every hypervisor driver keeps to; the same tests for the real ones and the fake.

A subclass is a test module's `Test…` class and provides `hypervisor()`, and `make()` for a spec that it can run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.protocol import Factory, Protocol

from host_agent.hypervisors.base import Hypervisor, HypervisorError, Machine, MachineSpec, MachineState
from host_agent.hypervisors.images import Image

DEADLINE = 60.0  # seconds for any one step of any driver


@attrs.define
class Told:
    """The states that a driver has told about one VM."""

    states: list[MachineState] = attrs.field(factory=list)
    reasons: list[str] = attrs.field(factory=list)

    def __call__(self, state: MachineState, reason: str) -> None:
        self.states.append(state)
        self.reasons.append(reason)


def state_of(machine: Machine) -> MachineState:
    """Its state now: a checker of types would take an attribute that it has seen for unchanged."""
    return machine.state


class HypervisorContract:
    """Each test makes one VM and leaves nothing of it."""

    def hypervisor(self) -> Hypervisor:
        raise NotImplementedError

    def image(self, request: pytest.FixtureRequest) -> Image:
        raise NotImplementedError

    @pytest.fixture
    def told(self) -> Told:
        return Told()

    @pytest.fixture
    def spec(self, request: pytest.FixtureRequest, tmp_path: Path, told: Told) -> MachineSpec:
        directory = tmp_path / "vm"
        directory.mkdir(mode=0o700)
        return MachineSpec(
            name="contract",
            instance=f"t-{abs(hash(request.node.nodeid)):x}"[:18],
            image=self.image(request),
            directory=directory,
            memory_mb=256,
            cpus=1,
            services={61613: Factory.forProtocol(Protocol)},
            guest_config=b'{"secret": "contract"}',
            on_state=told,
        )

    async def _made(self, spec: MachineSpec) -> Machine:
        from twisted.internet import reactor

        return await self.hypervisor().create(spec).addTimeout(DEADLINE, reactor)

    async def _wait(self, deferred: Any) -> Any:
        from twisted.internet import reactor

        return await deferred.addTimeout(DEADLINE, reactor)

    @ensureDeferred
    async def test_life(self, spec: MachineSpec, told: Told) -> None:
        machine = await self._made(spec)
        assert state_of(machine) is MachineState.DEFINED
        assert machine.pid is None
        try:
            await self._wait(machine.start())
            assert state_of(machine) is MachineState.RUNNING
            assert machine.pid is not None
            assert machine.cpu_seconds() >= 0
            assert isinstance(machine.console_tail(), str)
        finally:
            await self._wait(machine.destroy())
        assert state_of(machine) is MachineState.DESTROYED
        assert machine.pid is None
        assert not spec.directory.exists()
        assert told.states == [
            MachineState.STARTING,
            MachineState.RUNNING,
            MachineState.STOPPED,
            MachineState.DESTROYED,
        ]

    @ensureDeferred
    async def test_pause_and_resume_twice_are_once(self, spec: MachineSpec, told: Told) -> None:
        machine = await self._made(spec)
        try:
            await self._wait(machine.start())
            for _ in range(2):
                await self._wait(machine.pause())
                assert state_of(machine) is MachineState.PAUSED
            for _ in range(2):
                await self._wait(machine.resume())
                assert state_of(machine) is MachineState.RUNNING
            assert told.states.count(MachineState.PAUSED) == 1
        finally:
            await self._wait(machine.destroy())

    @ensureDeferred
    async def test_power_off_of_a_paused_machine_and_twice(self, spec: MachineSpec) -> None:
        machine = await self._made(spec)
        try:
            await self._wait(machine.start())
            await self._wait(machine.pause())
            for _ in range(2):
                await self._wait(machine.power_off())
                assert state_of(machine) is MachineState.STOPPED
            assert machine.pid is None
        finally:
            await self._wait(machine.destroy())

    @ensureDeferred
    async def test_destroy_without_start_and_twice(self, spec: MachineSpec) -> None:
        machine = await self._made(spec)
        for _ in range(2):
            await self._wait(machine.destroy())
            assert state_of(machine) is MachineState.DESTROYED
        assert not spec.directory.exists()

    @ensureDeferred
    async def test_image_is_never_written(self, spec: MachineSpec) -> None:
        before = spec.image.disk.stat()
        machine = await self._made(spec)
        try:
            await self._wait(machine.start())
        finally:
            await self._wait(machine.destroy())
        after = spec.image.disk.stat()
        assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)

    @ensureDeferred
    async def test_pause_of_a_machine_that_does_not_run(self, spec: MachineSpec) -> None:
        machine = await self._made(spec)
        try:
            with pytest.raises(HypervisorError):
                await machine.pause()
        finally:
            await self._wait(machine.destroy())

    @ensureDeferred
    async def test_saved_state_goes_on_where_it_was(self, spec: MachineSpec, told: Told) -> None:
        if not self.hypervisor().capabilities.save_state:
            return
        machine = await self._made(spec)
        try:
            with pytest.raises(HypervisorError):
                await machine.save_state()
            await self._wait(machine.start())
            for _ in range(2):
                await self._wait(machine.save_state())
                assert state_of(machine) is MachineState.SAVED
            assert machine.pid is None
            used = machine.cpu_seconds()
            await self._wait(machine.start())
            assert state_of(machine) is MachineState.RUNNING
            assert machine.pid is not None
            assert machine.cpu_seconds() >= used
            await self._wait(machine.pause())
            await self._wait(machine.save_state())
            assert state_of(machine) is MachineState.SAVED
        finally:
            await self._wait(machine.destroy())
        assert not spec.directory.exists()
        assert told.states == [
            MachineState.STARTING,
            MachineState.RUNNING,
            MachineState.SAVED,
            MachineState.STARTING,
            MachineState.RUNNING,
            MachineState.PAUSED,
            MachineState.SAVED,
            MachineState.DESTROYED,
        ]

    @ensureDeferred
    async def test_snapshots(self, spec: MachineSpec, told: Told) -> None:
        if not self.hypervisor().capabilities.live_snapshot:
            return
        machine = await self._made(spec)
        calls: list[MachineState] = []
        try:
            await self._wait(machine.start())
            assert await self._wait(machine.snapshots()) == []
            await self._wait(machine.snapshot("one", lambda: calls.append(state_of(machine))))
            assert state_of(machine) is MachineState.RUNNING
            await self._wait(machine.pause())
            await self._wait(machine.snapshot("two", lambda: calls.append(state_of(machine))))
            assert state_of(machine) is MachineState.PAUSED
            assert len(calls) == 2
            assert await self._wait(machine.snapshots()) == ["one", "two"]
            await self._wait(machine.snapshot("one", lambda: None))
            assert await self._wait(machine.snapshots()) == ["two", "one"]
            await self._wait(machine.restore("two"))
            assert state_of(machine) is MachineState.RUNNING
            await self._wait(machine.power_off())
            await self._wait(machine.restore("one"))
            assert state_of(machine) is MachineState.RUNNING
            for _ in range(2):
                await self._wait(machine.delete_snapshot("one"))
                assert await self._wait(machine.snapshots()) == ["two"]
            with pytest.raises(HypervisorError):
                await self._wait(machine.restore("one"))
            assert state_of(machine) is MachineState.RUNNING
        finally:
            await self._wait(machine.destroy())
        assert not spec.directory.exists()

    @ensureDeferred
    async def test_snapshot_that_its_caller_refuses(self, spec: MachineSpec) -> None:
        if not self.hypervisor().capabilities.live_snapshot:
            return
        machine = await self._made(spec)

        def refuse() -> None:
            raise OSError("no room for the note")

        try:
            await self._wait(machine.start())
            with pytest.raises(OSError, match="no room"):
                await self._wait(machine.snapshot("one", refuse))
            assert state_of(machine) is MachineState.RUNNING
            assert await self._wait(machine.snapshots()) == []
        finally:
            await self._wait(machine.destroy())

    @ensureDeferred
    async def test_machine_is_left_and_adopted(self, spec: MachineSpec, told: Told) -> None:
        hypervisor = self.hypervisor()
        if not hypervisor.capabilities.adopt:
            return
        assert await self._wait(hypervisor.adopt(spec)) is None
        spec.directory.mkdir(mode=0o700, exist_ok=True)  # what is of no use was removed
        machine = await self._wait(hypervisor.create(spec))
        last = machine
        try:
            await self._wait(machine.start())
            with pytest.raises(HypervisorError):
                await self._wait(hypervisor.adopt(spec))
            pid = machine.pid
            await self._wait(machine.pause())
            await self._wait(machine.leave())
            last = again = await self._wait(hypervisor.adopt(spec))
            assert (state_of(again), again.pid) == (MachineState.PAUSED, pid)
            await self._wait(again.resume())
            assert state_of(again) is MachineState.RUNNING
            if hypervisor.capabilities.save_state:
                await self._wait(again.save_state())
                await self._wait(again.leave())
                last = third = await self._wait(hypervisor.adopt(spec))
                assert state_of(third) is MachineState.SAVED
                await self._wait(third.start())
                assert state_of(third) is MachineState.RUNNING
        finally:
            await self._wait(last.destroy())
        assert not spec.directory.exists()
        assert await self._wait(hypervisor.adopt(spec)) is None

    @ensureDeferred
    async def test_requirements_never_fail(self) -> None:
        for requirement in await self._wait(self.hypervisor().requirements()):
            assert requirement.name
            assert requirement.found
