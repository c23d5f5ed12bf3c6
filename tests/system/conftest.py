"""A host agent in this process and guest agents as real processes: everything but virtual hardware."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import pytest_twisted
from twisted.internet import reactor

from host_agent.agent import HostAgent, build_host_agent
from host_agent.hypervisors.images import NO_IMAGE
from host_agent.hypervisors.process import ProcessHypervisor
from host_agent.operations import Operations
from host_agent.state import AgentState

DEADLINE = 120.0  # seconds for a guest's agent to answer


def ignore(name: str, data: dict[str, Any]) -> None:
    """Updates that a test does not look at."""


@attrs.define
class Laptop:
    """A host agent with one guest named `lap`; `home` is the guest's home directory, `host` ours."""

    agent: HostAgent
    home: Path
    host: Path
    events: list[tuple[str, dict[str, Any]]] = attrs.field(factory=list)

    @property
    def operations(self) -> Operations:
        return self.agent._control.operations

    async def run(self, *argv: str, **args: Any) -> dict[str, Any]:
        """Run a program in the guest; its updates are in `events`."""
        self.events.clear()

        def update(name: str, data: dict[str, Any]) -> None:
            self.events.append((name, data))

        request = {"vm": "lap", "argv": list(argv), "stream": True, **args}
        result: dict[str, Any] = await self.operations.run(request, update)
        return result

    def output(self, stream: str = "stdout") -> bytes:
        """What came of the last run."""
        return b"".join(data["bytes"] for name, data in self.events if name == "output" and data["stream"] == stream)

    async def put(self, source: Path, destination: str) -> dict[str, Any]:
        request = {"vm": "lap", "source": str(source), "destination": destination}
        result: dict[str, Any] = await self.operations.put(request, ignore)
        return result

    async def get(self, source: str, destination: Path) -> dict[str, Any]:
        request = {"vm": "lap", "source": source, "destination": str(destination)}
        result: dict[str, Any] = await self.operations.get(request, ignore)
        return result


@pytest_twisted.async_yield_fixture()
async def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Laptop]:
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))
    agent = build_host_agent(reactor, ProcessHypervisor(reactor), AgentState(tmp_path / "state"), stopped=lambda: None)
    await agent.start()
    vm = await agent._vms.start("lap", NO_IMAGE, tmp_path / "vms", deadline=DEADLINE, watch=lambda state, reason: None)
    (tmp_path / "host").mkdir()
    yield Laptop(agent, vm.machine.home, tmp_path / "host")  # type: ignore[union-attr]
    await agent.shut_down()
