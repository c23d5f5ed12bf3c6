"""Checkpoints of a VM and the way back, on a hypervisor that fails as it is told: what is kept, tried and given up."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from common.messages import Output, Run
from host_agent import checkpoints
from host_agent.agent import HostAgent, build_host_agent
from host_agent.hypervisors.base import HypervisorError, MachineState
from host_agent.hypervisors.fake import FakeHypervisor, FakeMachine, Script
from host_agent.hypervisors.images import NO_IMAGE
from host_agent.state import open_state
from host_agent.turn import Turn
from host_agent.virtual_machine import VirtualMachine
from host_agent.vms import Fate


@attrs.define
class Box:
    """A host agent with one VM, whose guest is us."""

    agent: HostAgent
    hypervisor: FakeHypervisor
    vm: VirtualMachine
    folder: Path

    @property
    def machine(self) -> FakeMachine:
        return self.hypervisor.machines[-1]

    @property
    def restored(self) -> list[str]:
        return [call.removeprefix("restore ") for call in self.machine.calls if call.startswith("restore ")]

    async def checkpoint(self, **note: Any) -> str:
        done = await self.agent._vms.checkpoints.make(self.vm, note)
        return str(done["snapshot"])

    def run(self) -> Any:
        """A command that has written something to its file."""
        run = Run("c-1", ("true",))
        command = self.agent._requests.commands.run(self.vm.guest, run, str(self.folder / "out"))
        self.say(0, b"one\n")
        return command

    def say(self, offset: int, text: bytes) -> None:
        self.agent._requests.commands.message(self.vm.guest, Output("c-1", "stdout", offset, text))

    async def until(self, true: Callable[[], bool]) -> None:
        for _ in range(6000):
            if true():
                return
            await deferLater(reactor, 0.01)
        raise AssertionError("it did not come about")

    async def crash(self) -> None:
        """Its process is killed; returns when that was answered."""
        self.machine.die()
        await self.until(lambda: not self.vm.going_back)


def start_agent(folder: Path, hypervisor: FakeHypervisor) -> HostAgent:
    return build_host_agent(reactor, hypervisor, open_state(folder / "state"), stopped=lambda: None)


@pytest_twisted.async_yield_fixture()
async def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Box]:
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))
    hypervisor = FakeHypervisor(reactor)
    hypervisor.capabilities = attrs.evolve(hypervisor.capabilities, image=False)
    agent = start_agent(tmp_path, hypervisor)
    await agent.start()
    coroutine = agent._vms.start("box", NO_IMAGE, tmp_path / "vms", watch=lambda state, reason: None)
    starting = Deferred.fromCoroutine(coroutine)
    (vm,) = agent._vms
    made = Box(agent, hypervisor, vm, tmp_path)
    await made.until(lambda: bool(vm.guest.arrivals))
    vm.guest.arrivals.pop().callback(None)
    await starting
    yield made
    await made.agent.shut_down()


@pytest_twisted.ensureDeferred
async def test_the_two_newest_are_kept(box: Box) -> None:
    for _ in range(4):
        await box.checkpoint()
    assert await box.machine.snapshots() == ["checkpoint-3", "checkpoint-4"]
    marks = {path.name.partition(".")[2] for path in box.agent._state.marks(box.vm.guest.id)}
    assert marks == {"checkpoint-3", "checkpoint-4"}


@pytest_twisted.ensureDeferred
async def test_a_vm_that_crashes_goes_back_with_its_commands_and_their_output(box: Box) -> None:
    command = box.run()
    told: list[tuple[str, dict[str, Any]]] = []
    command.watchers.append(lambda name, data: told.append((name, data)))
    await box.checkpoint(task=1)
    box.say(4, b"two\n")
    epoch = box.vm.guest.epoch
    await box.crash()
    assert box.machine.state is MachineState.RUNNING
    assert box.restored == ["checkpoint-1"]
    assert (box.folder / "out").read_bytes() == b"one\n"
    assert not command.ended
    assert box.vm.guest.epoch == epoch + 1
    assert ("rolled_back", {"note": {"task": 1}}) in told


@pytest_twisted.ensureDeferred
async def test_a_vm_without_a_checkpoint_is_over_when_it_crashes(box: Box) -> None:
    command = box.run()
    await box.crash()
    assert box.restored == []
    assert command.result.outcome == "lost"
    assert "ended unexpectedly: scripted death" in command.result.reason


@pytest_twisted.ensureDeferred
async def test_crashes_in_a_row_lead_to_the_checkpoint_before_and_then_to_the_end(box: Box) -> None:
    command = box.run()
    await box.checkpoint()
    await box.checkpoint()
    for _ in checkpoints.ATTEMPTS:
        await box.crash()
    assert box.restored == ["checkpoint-2"] * 4 + ["checkpoint-1"]
    assert not command.ended
    # What came after it is undone, and its output is written anew: nobody may ever go back there.
    assert await box.agent._vms.checkpoints.usable(box.vm) == ["checkpoint-1"]
    await box.crash()
    assert len(box.restored) == 5
    assert command.result.outcome == "lost"
    assert box.vm.describe(0, 0.0)["state"] == "crashed"


@pytest_twisted.ensureDeferred
async def test_a_new_checkpoint_gives_new_attempts(box: Box) -> None:
    for _ in range(7):
        await box.checkpoint()
        await box.crash()
    assert box.machine.state is MachineState.RUNNING


@pytest_twisted.ensureDeferred
async def test_a_paused_vm_that_is_killed_comes_back_paused(box: Box) -> None:
    await box.checkpoint()
    await box.agent._vms.pause(box.vm)
    await box.crash()
    assert box.machine.state is MachineState.PAUSED


@pytest_twisted.ensureDeferred
async def test_a_checkpoint_that_fails_leaves_the_earlier_ones_and_the_vm(box: Box) -> None:
    box.run()
    await box.checkpoint()
    box.say(4, b"two\n")
    box.machine.script = Script(snapshot_fails="No space left on device")
    with pytest.raises(HypervisorError, match="No space"):
        await box.checkpoint()
    assert await box.machine.snapshots() == ["checkpoint-1"]
    box.machine.script = Script()
    assert await box.checkpoint() == "checkpoint-2"
    await box.crash()
    assert (box.folder / "out").read_bytes() == b"one\ntwo\n"


@pytest_twisted.ensureDeferred
async def test_a_mark_that_cannot_be_written_is_no_checkpoint(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "mark")

    await box.checkpoint()
    monkeypatch.setattr(box.agent._requests, "mark", full)
    with pytest.raises(HypervisorError, match="No space left on device"):
        await box.checkpoint()
    assert await box.machine.snapshots() == ["checkpoint-1"]


@pytest_twisted.ensureDeferred
async def test_output_that_a_power_cut_took_makes_the_checkpoint_useless(box: Box) -> None:
    command = box.run()
    await box.checkpoint()
    box.say(4, b"two\n")
    await box.checkpoint()
    command.streams["stdout"].close()
    (box.folder / "out").write_bytes(b"one\ntw")
    await box.crash()
    assert box.restored == ["checkpoint-1"]
    assert (box.folder / "out").read_bytes() == b"one\n"


@pytest_twisted.ensureDeferred
async def test_checkpoints_take_turns(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "TURN_DEADLINE", 0.1)
    other = Turn(reactor, box.folder / "run" / checkpoints.TURN_FILE)
    assert await other.take(1.0)
    with pytest.raises(HypervisorError, match="other VMs' checkpoints took too long"):
        await box.checkpoint()
    other.give_back()
    await box.checkpoint()
    assert await other.take(1.0)
    other.give_back()


@pytest.mark.parametrize(
    ("fate", "left", "state"),
    [
        (Fate.END, False, MachineState.DESTROYED),
        (Fate.KEEP, True, MachineState.STOPPED),
        (Fate.LEAVE, True, MachineState.RUNNING),
    ],
)
@pytest_twisted.ensureDeferred
async def test_what_becomes_of_a_vm_when_its_agent_ends(box: Box, fate: Fate, left: bool, state: MachineState) -> None:
    command = box.run()
    await box.checkpoint()
    box.say(4, b"two\n")
    await box.agent.shut_down(fate)
    assert box.machine.state is state
    assert (box.folder / "state").exists() == left
    if not left:
        return
    agent = start_agent(box.folder, box.hypervisor)
    await agent.start()
    box.agent = agent
    (box.vm,) = agent._vms
    assert box.machine.state is MachineState.RUNNING
    again = agent._requests.commands.get(command.id)
    assert again is not None
    assert not again.ended
    assert (box.folder / "out").read_bytes() == (b"one\n" if fate is Fate.KEEP else b"one\ntwo\n")


@pytest_twisted.ensureDeferred
async def test_a_saved_state_is_a_checkpoint_too(box: Box) -> None:
    """After the next start, a VM that crashes goes back to where it was saved, not farther."""
    box.run()
    await box.checkpoint()
    box.say(4, b"two\n")
    await box.agent._vms.checkpoints.save(box.vm)
    await box.agent._vms.resume(box.vm)
    box.say(8, b"three\n")
    await box.crash()
    assert box.restored == ["saved"]
    assert (box.folder / "out").read_bytes() == b"one\ntwo\n"


@pytest.mark.parametrize("completed", [True, False])
@pytest_twisted.ensureDeferred
async def test_an_agent_that_died_while_it_saved(box: Box, completed: bool) -> None:
    mark = box.agent._state.mark_file(box.vm.guest.id, "saved")
    await box.agent._vms.checkpoints.save(box.vm)
    mark.replace(mark.with_name(f"{mark.name}.new"))
    if not completed:
        await box.agent._vms.resume(box.vm)
    box.agent._vms.checkpoints.settle(box.vm)
    assert mark.exists() == completed
    assert not mark.with_name(f"{mark.name}.new").exists()


@pytest_twisted.ensureDeferred
async def test_a_checkpoint_that_is_under_way_when_the_vm_crashes_is_waited_for(box: Box) -> None:
    box.run()
    await box.checkpoint()
    await box.vm.keeping.acquire()
    box.machine.die()
    await deferLater(reactor, 0.05)
    assert box.restored == []
    box.vm.keeping.release()
    await box.until(lambda: not box.vm.going_back)
    assert box.restored == ["checkpoint-1"]


@pytest_twisted.ensureDeferred
async def test_what_is_of_no_use_is_removed_with_the_next_checkpoint(box: Box) -> None:
    """A mark whose snapshot never came about, and a snapshot whose mark is damaged."""
    await box.checkpoint()
    box.agent._state.mark_file(box.vm.guest.id, "checkpoint-1").write_text("{")
    box.agent._state.mark_file(box.vm.guest.id, "checkpoint-7").write_text("{}")
    await box.checkpoint()
    assert await box.machine.snapshots() == ["checkpoint-2"]
    assert [path.suffix for path in box.agent._state.marks(box.vm.guest.id)] == [".checkpoint-2"]


@pytest_twisted.ensureDeferred
async def test_a_damaged_mark_is_passed_over(box: Box) -> None:
    await box.checkpoint()
    await box.checkpoint()
    mark = box.agent._state.mark_file(box.vm.guest.id, "checkpoint-2")
    mark.write_text(json.dumps({"commands": 7}))
    assert await box.agent._vms.checkpoints.usable(box.vm) == ["checkpoint-1"]
