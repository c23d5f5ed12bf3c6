"""A real VM with a closed network over an external broker with TLS: the guest itself checks the certificate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor

from host_agent.agent import build_host_agent
from host_agent.hypervisors.images import Image
from host_agent.hypervisors.qemu import QemuHypervisor
from host_agent.state import AgentState
from tests.brokers import RunningBroker

pytestmark = pytest.mark.vm
SECONDS = 180.0


@pytest_twisted.ensureDeferred
async def test_a_command_over_activemq_with_tls(
    image: Image, activemq_tls: RunningBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))
    hypervisor: Any = QemuHypervisor(reactor)
    agent = build_host_agent(
        reactor, hypervisor, AgentState(tmp_path / "state"), stopped=lambda: None, external=activemq_tls.settings
    )
    await agent.start()
    try:
        await agent._vms.start("box", image, tmp_path, deadline=SECONDS, watch=lambda state, reason: None)
        output: list[bytes] = []

        def update(name: str, data: dict[str, Any]) -> None:
            if name == "output":
                output.append(data["bytes"])

        request = {"vm": "box", "argv": ["uname", "-n"], "stream": True}
        result = await agent._control.operations.run(request, update).addTimeout(SECONDS, reactor)
        assert result["exit_code"] == 0
        assert b"".join(output).strip()
    finally:
        await agent.shut_down()
