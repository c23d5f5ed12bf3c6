"""What goes wrong with a VM is said in one sentence, by a deadline, and leaves nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import attrs
import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, fail, gatherResults, succeed
from twisted.internet.task import deferLater

from common import messages
from common.messages import Result
from host_agent import trouble, virtual_machine
from host_agent.admission import Admission, Host
from host_agent.agent import HostAgent, build_host_agent
from host_agent.guests import SILENT_AFTER, Presence
from host_agent.hypervisors.base import HeldByAnother, HypervisorHangs, MachineState, Requirement
from host_agent.hypervisors.fake import FakeHypervisor, Script
from host_agent.hypervisors.images import NO_IMAGE
from host_agent.operations import explained
from host_agent.state import open_state
from host_agent.virtual_machine import VirtualMachine, VMExists, VMFailed
from host_agent.vms import Fate


@pytest_twisted.async_yield_fixture()
async def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[HostAgent]:
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))
    hypervisor = FakeHypervisor(reactor)
    agent = build_host_agent(reactor, hypervisor, open_state(None), stopped=lambda: None)
    agent.fake = hypervisor  # type: ignore[attr-defined]
    await agent.start()
    yield agent
    await agent.shut_down()


@pytest.mark.parametrize(
    ("script", "sentence", "hint"),
    [
        (Script(create_fails="the disk is full"), "the disk is full", "doctor"),
        (Script(start_fails="no such machine type"), "no such machine type", "doctor"),
        (Script(console="init: hello\nKernel panic"), "did not answer within 1 s", "Kernel panic"),
        (Script(dies_after=0.05, dies_of="killed by signal 11", console="x"), "killed by signal 11", ""),
        (Script(powers_off_after=0.05), "powered off by its guest", ""),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_vm_that_does_not_start(
    agent: HostAgent, tmp_path: Path, script: Script, sentence: str, hint: str
) -> None:
    agent.fake.script = script  # type: ignore[attr-defined]
    deadline = 1.0 if "did not answer" in sentence else 60.0  # the others end by themselves, on a busy machine too
    with pytest.raises(VMFailed, match=sentence) as failed:
        await agent._vms.start("vm", NO_IMAGE, tmp_path / "vms", deadline=deadline, watch=lambda state, reason: None)
    assert hint in failed.value.hint
    assert list(agent._vms) == []
    assert [path.name for path in (tmp_path / "vms").iterdir()] == (
        ["vm_failed_vm.console.log"] if script.console else []
    )


class Lacking(FakeHypervisor):
    def requirements(self) -> Deferred[list[Requirement]]:
        found = [
            Requirement("driver", False, "is not loaded", "modprobe it"),
            Requirement("speed", False, "low", "", False),
        ]
        return succeed(found)


@pytest_twisted.ensureDeferred
async def test_what_the_host_lacks_is_said_when_a_vm_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked for at each start of a host agent."""
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))
    hypervisor = Lacking(reactor, Script(start_fails="no"))
    agent = build_host_agent(reactor, hypervisor, open_state(None), stopped=lambda: None)
    await agent.start()
    with pytest.raises(VMFailed) as failed:
        await agent._vms.start("vm", NO_IMAGE, tmp_path / "vms", watch=lambda state, reason: None)
    assert failed.value.hint == "driver: is not loaded; modprobe it"
    await agent.shut_down()


class WithoutImages(FakeHypervisor):
    capabilities = attrs.evolve(FakeHypervisor.capabilities, image=False)


@pytest_twisted.ensureDeferred
async def test_nothing_is_touched_of_a_vm_that_a_living_agent_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state directory is another's now, because it ends; but it has not let go of the VM yet."""
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))
    hypervisor = WithoutImages(reactor)
    first = build_host_agent(reactor, hypervisor, open_state(tmp_path / "state"), stopped=lambda: None)
    await first.start()
    vm = await ready(first, tmp_path / "vms")
    first._vms.keep(vm.guest)
    shutil.copytree(tmp_path / "state", tmp_path / "same")
    second = build_host_agent(reactor, hypervisor, open_state(tmp_path / "same"), stopped=lambda: None)
    with pytest.raises(HeldByAnother):
        await second.start()
    await second.shut_down(Fate.LEAVE)
    assert vm.directory.is_dir()
    assert hypervisor.machines[0].state is MachineState.RUNNING
    assert json.loads((tmp_path / "same" / "agent.json").read_text())["vms"], "its successor may have it"
    await first.shut_down()


@pytest_twisted.ensureDeferred
async def test_a_vm_that_is_stopped_by_several_at_once_ends_once(agent: HostAgent, tmp_path: Path) -> None:
    agent.fake.script = Script(power_off_takes=0.2, start_takes=None)  # type: ignore[attr-defined]
    start = agent._vms.start("vm", NO_IMAGE, tmp_path / "vms", watch=lambda state, reason: None)
    starting = Deferred.fromCoroutine(start)
    (vm,) = agent._vms
    waiting = [agent._vms.stop(vm), agent._vms.stop(vm), agent.shut_down(), agent.shut_down()]
    await gatherResults(waiting)
    starting.addErrback(lambda _: None)
    starting.cancel()
    assert list(agent._vms) == []
    assert agent.fake.machines[0].calls.count("destroy") == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["", "../x", "a/b", "x" * 65, "a\n"])
@pytest_twisted.ensureDeferred
async def test_a_bad_name_starts_nothing(agent: HostAgent, tmp_path: Path, name: str) -> None:
    with pytest.raises(Exception, match="cannot name a VM"):
        await agent._vms.start(name, NO_IMAGE, tmp_path / "vms", watch=lambda state, reason: None)
    assert not (tmp_path / "vms").exists()


async def ready(agent: HostAgent, parent: Path) -> VirtualMachine:
    """A VM whose agent has answered, as far as the host agent knows."""
    starting = agent._vms.start("vm", NO_IMAGE, parent, watch=lambda state, reason: None)
    started = Deferred.fromCoroutine(starting)
    (vm,) = agent._vms
    await until(lambda: vm.machine is not None and vm.machine.state is MachineState.RUNNING)
    arrivals, vm.guest.arrivals = vm.guest.arrivals, []
    vm.guest.presence, vm.guest.last_seen = Presence.PRESENT, time.monotonic()
    for waiter in arrivals:
        waiter.callback(None)
    await started
    return vm


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        await deferLater(reactor, 0.01)


@pytest_twisted.ensureDeferred
async def test_a_silent_agent_is_given_up(agent: HostAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent.fake.script = Script(console="hung", screen=b"PNG")  # type: ignore[attr-defined]
    vm = await ready(agent, tmp_path)
    vm.guest.presence = Presence.SILENT
    vm.guest.last_seen = time.monotonic() - SILENT_AFTER - trouble.SILENT_MOST + 60
    agent._vms._troubles._look()
    assert not vm.failing, "it has some time left"
    vm.guest.last_seen -= 61
    vm.held = True
    agent._vms._troubles._look()
    assert not vm.failing, "a paused VM says nothing"
    vm.held = False
    agent._vms._troubles._look()
    await until(lambda: bool(vm.reason))
    assert "ended unexpectedly: it runs, but its agent has said nothing for 1" in vm.reason
    assert vm.guest.presence is Presence.GONE
    assert (tmp_path / "vm_failed_vm.console.log").read_text() == "hung\n"
    assert (tmp_path / "vm_failed_vm.screen.png").read_bytes() == b"PNG"


@pytest_twisted.ensureDeferred
async def test_a_vm_that_stands_still_by_itself(agent: HostAgent, tmp_path: Path) -> None:
    """A full disk: it is let go on now and then, and when that does not help it fails with the reason."""
    vm = await ready(agent, tmp_path)
    machine = agent.fake.machines[-1]  # type: ignore[attr-defined]
    machine.stall("this computer's disk is full")
    agent._vms._troubles._look()
    assert machine.calls[-1] == "resume"
    assert machine.state is MachineState.RUNNING
    machine.stall("this computer's disk is full")
    assert vm.stalled is not None
    vm.stalled.since -= trouble.STALL_MOST + 1
    agent._vms._troubles._look()
    await until(lambda: bool(vm.reason))
    assert "The VM vm ended unexpectedly: this computer's disk is full, for 12" in vm.reason


@pytest_twisted.ensureDeferred
async def test_a_pause_that_was_asked_for_is_left_alone(agent: HostAgent, tmp_path: Path) -> None:
    vm = await ready(agent, tmp_path)
    await agent._vms.pause(vm)
    agent._vms._troubles._look()
    assert vm.machine is not None and vm.machine.state is MachineState.PAUSED
    assert vm.stalled is None


@pytest_twisted.ensureDeferred
async def test_a_hypervisor_that_hangs_when_it_is_to_pause(agent: HostAgent, tmp_path: Path) -> None:
    vm = await ready(agent, tmp_path)
    machine = agent.fake.machines[-1]  # type: ignore[attr-defined]
    machine.pause = lambda: fail(HypervisorHangs("QEMU hangs: no answer to stop within 30 s"))
    with pytest.raises(HypervisorHangs):
        await agent._vms.pause(vm)
    await until(lambda: bool(vm.reason))
    assert vm.reason == "The VM vm ended unexpectedly: QEMU hangs: no answer to stop within 30 s"


@pytest_twisted.ensureDeferred
async def test_a_guest_with_another_agent_is_named_at_once(agent: HostAgent, tmp_path: Path) -> None:
    starting = agent._vms.start("vm", NO_IMAGE, tmp_path, deadline=60.0, watch=lambda state, reason: None)
    started = Deferred.fromCoroutine(starting)
    (vm,) = agent._vms
    await until(lambda: bool(vm.guest.arrivals))
    for head in ({"t": "HELLO", "v": 99}, {"t": "HELLO", "v": 99, "guest": "g-0"}, ["no", "message"]):
        agent._guests.received(json.dumps(head).encode())
    assert vm.guest.arrivals, "that was not this guest"
    agent._guests.received(json.dumps({"t": "HELLO", "v": 0, "guest": vm.guest.id, "agent_version": "0.0.1"}).encode())
    with pytest.raises(VMFailed) as failed:
        await started
    assert failed.value.code == "foreign_agent"
    assert str(failed.value) == (
        "The agent 0.0.1 in the image of the VM vm is of another version than this host agent: "
        f"a message speaks protocol version 0, not {messages.VERSION}."
    )
    assert failed.value.hint == "build or fetch the image anew: vmctl image build"


@pytest_twisted.ensureDeferred
async def test_a_start_that_takes_long_tells_of_it(
    agent: HostAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(virtual_machine, "PROGRESS_EVERY", 0.1)
    agent.fake.script = Script(console="Loading, please wait")  # type: ignore[attr-defined]
    told: list[str] = []
    with pytest.raises(VMFailed):
        await agent._vms.start(
            "vm", NO_IMAGE, tmp_path, deadline=1.0, watch=lambda state, reason: told.append(f"{state} {reason}")
        )
    tale = r"running for [01] s, and its agent has not answered yet; its console says: Loading, please wait"
    assert any(re.fullmatch(tale, each) for each in told), told


@pytest_twisted.ensureDeferred
async def test_who_asks_for_a_vm_that_is_starting_waits_for_the_same(agent: HostAgent, tmp_path: Path) -> None:
    first = Deferred.fromCoroutine(agent._vms.start("vm", NO_IMAGE, tmp_path, watch=lambda state, reason: None))
    second = Deferred.fromCoroutine(agent._vms.start("vm", NO_IMAGE, tmp_path, watch=lambda state, reason: None))
    (vm,) = agent._vms
    await until(lambda: bool(vm.guest.arrivals))
    arrivals, vm.guest.arrivals = vm.guest.arrivals, []
    for waiter in arrivals:
        waiter.callback(None)
    assert await gatherResults([first, second]) == [vm, vm]
    assert len(agent.fake.machines) == 1  # type: ignore[attr-defined]
    with pytest.raises(VMExists):
        await agent._vms.start("vm", NO_IMAGE, tmp_path, watch=lambda state, reason: None)


@pytest_twisted.ensureDeferred
async def test_who_waits_for_a_vm_that_does_not_start_hears_of_it(agent: HostAgent, tmp_path: Path) -> None:
    agent.fake.script = Script(dies_after=0.1, dies_of="killed by signal 11")  # type: ignore[attr-defined]
    both = [
        Deferred.fromCoroutine(agent._vms.start("vm", NO_IMAGE, tmp_path, watch=lambda state, reason: None))
        for _ in range(2)
    ]
    for each in both:
        with pytest.raises(VMFailed, match="killed by signal 11"):
            await each


def test_a_program_that_was_ended_for_want_of_memory() -> None:
    killed = Result("c-1", "signalled", signal="KILL")
    console = "[ 9.1] Out of memory: Killed process 77 (worker)\ninit: something else"
    assert explained(killed, console).reason.startswith("the virtual machine ran out of memory")
    assert explained(killed, "init: nothing") == killed
    assert explained(Result("c-1", "exited", exit_code=1), console).reason == ""


@pytest_twisted.ensureDeferred
async def test_a_vm_that_outgrows_its_disk_limit(agent: HostAgent, tmp_path: Path) -> None:
    vm = await ready(agent, tmp_path)
    (vm.directory / "disk").write_bytes(os.urandom(3 << 20))
    limits = {"vm": "vm", "cpu_percent": 40, "disk_mb": 4}
    agent._control.operations.limit_vm(limits, lambda name, data: None)
    assert agent.fake.machines[-1].calls[-1] == "limit 0.4"  # type: ignore[attr-defined]
    agent._vms._troubles._look()
    assert not vm.failing
    (vm.directory / "state").write_bytes(os.urandom(3 << 20))
    agent._vms._troubles._look()
    await until(lambda: bool(vm.reason))
    assert vm.reason.endswith("its disk, states and snapshots use 6 MB, and the job may use 4 MB")


@pytest_twisted.ensureDeferred
async def test_a_vm_waits_until_there_is_memory(
    agent: HostAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_mb = [100]
    monkeypatch.setattr(agent._vms, "_admission", Admission(reactor, Host(8, lambda: free_mb[0])))
    told: list[str] = []
    starting = agent._vms.start(
        "vm", NO_IMAGE, tmp_path, memory_mb=200, watch=lambda state, reason: told.append(f"{state}: {reason}")
    )
    started = Deferred.fromCoroutine(starting)
    assert told == ["waiting: this computer has 100 MB of memory free, and a VM needs 456 MB"]
    assert agent.fake.machines == []  # type: ignore[attr-defined]
    free_mb[0] = 1000
    (vm,) = agent._vms
    await until(lambda: bool(vm.guest.arrivals))
    await agent._vms.stop(vm)
    with pytest.raises(VMFailed):
        await started
    assert list((tmp_path / "run" / "admission").glob("*.json")) == []
