"""A Linux guest with its agent over VirtualBox's NAT: what only a host with the kernel driver can show.

`make test-virtualbox-host` runs this on such a host; CI does not. `VMWRAPPER_VIRTUALBOX_IMAGE` names an image with a
boot loader, as vdi, vmdk or ova, whose agent reads its settings from the ISO.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import pytest_twisted
from pytest_twisted import ensureDeferred
from twisted.internet import reactor

from host_agent.agent import HostAgent, build_host_agent
from host_agent.hypervisors.choice import make_hypervisor
from host_agent.hypervisors.images import find_image
from host_agent.operations import Operations
from host_agent.state import AgentState

HYPERVISOR = os.environ.get("VMWRAPPER_HYPERVISOR", "virtualbox")  # another one tries the test itself
BOOT_DEADLINE = 300.0


@attrs.define
class Box:
    """A host agent with a VM named `box`."""

    agent: HostAgent

    @property
    def operations(self) -> Operations:
        return self.agent._control.operations

    async def run(self, *argv: str) -> tuple[dict[str, Any], bytes]:
        output = b""

        def update(name: str, data: dict[str, Any]) -> None:
            nonlocal output
            if name == "output":
                output += data["bytes"]

        result = await self.operations.run({"vm": "box", "argv": list(argv), "stream": True}, update)
        return result, output


@pytest_twisted.async_yield_fixture()
async def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Box]:
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))
    image = find_image(os.environ["VMWRAPPER_VIRTUALBOX_IMAGE"])
    hypervisor = make_hypervisor(HYPERVISOR, reactor)
    agent = build_host_agent(reactor, hypervisor, AgentState(tmp_path / "state"), stopped=lambda: None)
    await agent.start()
    try:
        await agent._vms.start("box", image, tmp_path, deadline=BOOT_DEADLINE, watch=lambda state, reason: None)
        yield Box(agent)
    finally:
        await agent.shut_down()


@ensureDeferred
async def test_commands_and_copies(box: Box, tmp_path: Path) -> None:
    result, output = await box.run("/bin/sh", "-c", "echo from the guest; exit 3")
    assert (result["exit_code"], output) == (3, b"from the guest\n")
    source, back = tmp_path / "data", tmp_path / "back"
    source.write_bytes(os.urandom(3_000_000))
    await box.operations.put({"vm": "box", "source": str(source), "destination": "data"}, lambda name, data: None)
    await box.operations.get({"vm": "box", "source": "data", "destination": str(back)}, lambda name, data: None)
    assert back.read_bytes() == source.read_bytes()


@ensureDeferred
async def test_guest_goes_on_after_a_saved_state_and_goes_back_to_a_snapshot(box: Box) -> None:
    vm = box.agent._vms.get("box")
    assert vm is not None
    await box.run("/bin/sh", "-c", "echo one >counter")
    await box.agent._vms.checkpoints.save(vm)
    await box.agent._vms.resume(vm)
    assert (await box.run("cat", "counter"))[1] == b"one\n"
    await box.agent._vms.checkpoints.snapshot(vm, "early")
    await box.run("/bin/sh", "-c", "echo two >counter")
    await box.agent._vms.checkpoints.restore(vm, "early")
    assert (await box.run("cat", "counter"))[1] == b"one\n"
