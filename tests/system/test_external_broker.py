"""Both agents over the real external brokers."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import pytest_twisted
from twisted.internet import reactor, task
from twisted.internet.defer import Deferred

from common import messages
from common.errors import ConfigError
from host_agent.agent import HostAgent, build_host_agent
from host_agent.broker.settings import BrokerSettings
from host_agent.hypervisors.images import NO_IMAGE
from host_agent.hypervisors.process import ProcessHypervisor
from host_agent.state import AgentState
from tests.brokers import RunningBroker

from .conftest import DEADLINE, ignore

LONG = 120.0  # seconds for both ends to find a broker again, with their growing waits


async def start(folder: Path, settings: BrokerSettings) -> HostAgent:
    state = AgentState(folder / "state")
    agent = build_host_agent(reactor, ProcessHypervisor(reactor), state, stopped=lambda: None, external=settings)
    await agent.start()
    return agent


async def start_vm(agent: HostAgent, folder: Path, name: str) -> Any:
    return await agent._vms.start(name, NO_IMAGE, folder / "vms", deadline=DEADLINE, watch=lambda state, reason: None)


async def run(agent: HostAgent, vm: str, *argv: str) -> tuple[dict[str, Any], bytes]:
    output: list[bytes] = []

    def update(name: str, data: dict[str, Any]) -> None:
        if name == "output":
            output.append(data["bytes"])

    running: Deferred[dict[str, Any]] = agent._control.operations.run(
        {"vm": vm, "argv": list(argv), "stream": True}, update
    )
    running.addTimeout(LONG, reactor)
    return await running, b"".join(output)


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))


@pytest_twisted.async_yield_fixture()
async def agent(external: RunningBroker, tmp_path: Path) -> AsyncIterator[HostAgent]:
    """A host agent on each of the brokers in turn."""
    made = await start(tmp_path, external.settings)
    yield made
    await made.shut_down()


@pytest_twisted.ensureDeferred
async def test_commands_and_copies(agent: HostAgent, tmp_path: Path) -> None:
    vms = [await start_vm(agent, tmp_path, name) for name in ("one", "two")]
    for vm in vms:
        result, output = await run(agent, vm.name, "sh", "-c", "echo $0; head -c 3000000 /dev/zero", vm.name)
        assert result["exit_code"] == 0
        assert output == vm.name.encode() + b"\n" + bytes(3_000_000)
    (tmp_path / "file").write_bytes(bytes(range(256)) * 5000)
    request = {"vm": "one", "source": str(tmp_path / "file"), "destination": "copy"}
    await agent._control.operations.put(request, ignore)
    assert (vms[0].machine.home / "copy").read_bytes() == (tmp_path / "file").read_bytes()


@pytest_twisted.ensureDeferred
async def test_a_login_is_used_again_and_nothing_of_the_guest_before_is_read(agent: HostAgent, tmp_path: Path) -> None:
    """There are two logins: the third VM waits until one is free, and its queue has been emptied."""
    first, second = [await start_vm(agent, tmp_path, name) for name in ("one", "two")]
    with pytest.raises(ConfigError, match=r"all 2 guest logins of .* are in use"):
        await start_vm(agent, tmp_path, "three")
    login, secret = first.guest.identity.login, first.guest.identity.secret
    await first.machine.pause()  # it reads nothing more
    agent.send(messages.guest_queue(login), b"for the guest before")
    await agent._vms.stop(first)
    third = await start_vm(agent, tmp_path, "three")
    assert third.guest.identity.login == login != second.guest.identity.login
    assert third.guest.id != first.guest.id and third.guest.identity.secret != secret
    assert (await run(agent, "three", "true"))[0]["exit_code"] == 0
    assert "refused a message" not in third.machine.console_tail(200)  # what was not for it would be no message


@pytest_twisted.ensureDeferred
async def test_two_host_agents_cannot_be_one(agent: HostAgent, external: RunningBroker, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another host agent uses the broker settings"):
        await start(tmp_path / "second", external.settings)


@pytest.fixture(params=["activemq", "rabbitmq"])
def own_brokers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[RunningBroker]]:
    """Two brokers with the same logins, for a fail-over list."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(RunningBroker.make(request.param, tmp_path, guests=2))
        second = stack.enter_context(first.twin(tmp_path))
        yield [first, second]


@pytest_twisted.ensureDeferred
async def test_a_killed_broker_is_followed_by_the_next_of_the_list(
    own_brokers: list[RunningBroker], tmp_path: Path
) -> None:
    first, second = own_brokers
    settings = first.settings
    settings = attrs.evolve(settings, brokers=(*settings.brokers, *second.settings.brokers))
    agent = await start(tmp_path, settings)
    try:
        await start_vm(agent, tmp_path, "one")
        running = Deferred.fromCoroutine(run(agent, "one", "sh", "-c", "echo begun; sleep 3; echo done"))
        await task.deferLater(reactor, 0.5, first.kill)
        result, output = await running
        assert (result["exit_code"], output) == (0, b"begun\ndone\n")
        link: Any = agent._link
        assert link.address == second.settings.brokers[0]
        # And back, when the second is gone.
        first.start()
        second.kill()
        result, output = await run(agent, "one", "echo", "again")
        assert (result["exit_code"], output) == (0, b"again\n")
    finally:
        await agent.shut_down()
