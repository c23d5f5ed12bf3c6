"""What goes wrong with a VM is said in one sentence, by a deadline, and leaves nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults

from host_agent.agent import HostAgent, build_host_agent
from host_agent.hypervisors.fake import FakeHypervisor, Script
from host_agent.hypervisors.images import NO_IMAGE
from host_agent.state import open_state
from host_agent.vms import VMFailed


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
    with pytest.raises(VMFailed, match=sentence) as failed:
        await agent._vms.start("vm", NO_IMAGE, tmp_path / "vms", deadline=1.0, watch=lambda state, reason: None)
    assert hint in failed.value.hint
    assert list(agent._vms) == []
    assert list((tmp_path / "vms").iterdir()) == []


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
