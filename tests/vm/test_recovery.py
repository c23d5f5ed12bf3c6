"""A real VM whose host agent is killed, or that goes back to an older snapshot: no gap, no repeat, nothing lost."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.transfer import scan
from host_agent import exchange
from host_agent.hypervisors.images import Image
from tests.system.agent_process import DEADLINE, AgentProcess, agent_process

pytestmark = pytest.mark.vm

COUNT = "echo x >> effects; i=0; while [ $i -lt 60 ]; do i=$((i+1)); echo $i; sleep 0.25; done"
SIXTY = "".join(f"{number}\n" for number in range(1, 61))


@pytest.fixture
def agent(tmp_path: Path, image: Image) -> Iterator[AgentProcess]:
    with agent_process(tmp_path, hypervisor="qemu") as running:
        running.call("start_vm", vm="box", image=str(image.directory), directory=str(tmp_path / "vms"))
        yield running


def wait_for_lines(file: Path, count: int) -> None:
    until = time.monotonic() + DEADLINE
    while not file.exists() or file.read_bytes().count(b"\n") < count:
        assert time.monotonic() < until
        time.sleep(0.05)


def effects(agent: AgentProcess) -> int:
    (folder,) = [agent.folder]
    agent.call("get", vm="box", source="effects", destination=str(folder / "effects"))
    return (folder / "effects").read_text().count("x")


def test_the_host_agent_is_killed_and_the_command_goes_on(agent: AgentProcess, tmp_path: Path) -> None:
    out = tmp_path / "out"
    agent.begin("box", "c-count", COUNT, stdout=str(out))
    wait_for_lines(out, 5)
    agent.restart()
    wait_for_lines(out, 12)
    result = agent.call("run", vm="box", command="c-count", argv=["false"])
    assert (result["outcome"], result["exit_code"]) == ("exited", 0)
    assert out.read_text() == SIXTY
    assert effects(agent) == 1


def test_back_to_an_older_snapshot(agent: AgentProcess, tmp_path: Path) -> None:
    """What the host saw finish since then is undone, what ran then runs again, and the output is as if in one go."""
    out = tmp_path / "out"
    agent.begin("box", "c-count", COUNT, stdout=str(out))
    wait_for_lines(out, 5)
    (vm,) = agent.call("vms")["vms"]
    agent.call("snapshot_vm", vm="box", snapshot="s1")
    agent.call("run", vm="box", command="c-later", argv=["sh", "-c", "echo x >> later"])
    agent.begin("box", "c-undone", "sleep 600")
    assert agent.call("run", vm="box", command="c-count", argv=["false"])["exit_code"] == 0
    assert out.read_text() == SIXTY

    agent.call("restore_vm", vm="box", snapshot="s1")
    assert len(out.read_text()) < len(SIXTY)
    undone = agent.call("attach", command="c-undone")
    assert undone["outcome"] == "lost"
    assert "undone" in undone["reason"]
    again = agent.call("attach", command="c-count")
    assert (again["outcome"], again["exit_code"]) == ("exited", 0)
    assert out.read_text() == SIXTY
    assert effects(agent) == 1
    later = agent.call("run", vm="box", argv=["test", "-e", "later"])
    assert later["exit_code"] == 1
    (after,) = agent.call("vms")["vms"]
    assert after["epoch"] > vm["epoch"]


def test_a_saved_vm_comes_back_with_its_command(agent: AgentProcess, tmp_path: Path) -> None:
    """Saved, the host agent gone, another one started: the command goes on where it stood."""
    out = tmp_path / "out"
    agent.begin("box", "c-count", COUNT, stdout=str(out))
    wait_for_lines(out, 5)
    assert agent.call("save_vm", vm="box")["state"] == "saved"
    agent.restart()
    agent.call("resume_vm", vm="box")
    result = agent.call("attach", command="c-count")
    assert (result["outcome"], result["exit_code"]) == ("exited", 0)
    assert out.read_text() == SIXTY
    assert effects(agent) == 1


def test_a_vm_that_died_without_a_host_agent_goes_back_to_its_snapshot(agent: AgentProcess, tmp_path: Path) -> None:
    out = tmp_path / "out"
    agent.begin("box", "c-count", COUNT, stdout=str(out))
    wait_for_lines(out, 5)
    agent.call("snapshot_vm", vm="box", snapshot="s1")
    wait_for_lines(out, 9)
    (vm,) = agent.call("vms")["vms"]
    agent.kill()
    os.kill(vm["pid"], signal.SIGKILL)
    agent.start()
    result = agent.call("attach", command="c-count")
    assert (result["outcome"], result["exit_code"]) == ("exited", 0)
    assert out.read_text() == SIXTY
    assert effects(agent) == 1


@pytest.mark.parametrize("call", ["put", "get"])
def test_back_to_a_snapshot_of_the_middle_of_a_copy(agent: AgentProcess, tmp_path: Path, call: str) -> None:
    """What lies on the exchange disk then is not what the guest was told; the copy is whole nevertheless."""
    source, back = tmp_path / "source", tmp_path / "back"
    size = 6 * exchange.SIZE
    with source.open("wb") as file:
        for _ in range(6):
            file.write(os.urandom(exchange.SIZE))
    there = {
        "put": {"source": str(source), "destination": "there"},
        "get": {"source": "there", "destination": str(back)},
    }
    if call == "get":
        agent.call("put", vm="box", **there["put"])
    (disk,) = (tmp_path / "vms").glob(f"*/{exchange.NAME}")
    assert disk.stat().st_size == exchange.SIZE
    progress: list[int] = []
    assert agent.client is not None
    agent.client.start(
        call, {"vm": "box", "copy": "c-1", **there[call]}, lambda _, data: progress.append(data["bytes"])
    )
    while not progress or progress[-1] < size // 4:
        agent.pump()
    agent.call("snapshot_vm", vm="box", snapshot="s1")
    done = agent.call(call, vm="box", copy="c-1", **there[call])
    assert any(disk.read_bytes()), "it went by the disk"

    agent.call("restore_vm", vm="box", snapshot="s1")
    again = agent.call(call, vm="box", copy="c-1", **there[call])
    with source.open("rb") as file:
        digest = hashlib.sha256(scan(source).to_json())
        while piece := file.read(exchange.SIZE):
            digest.update(piece)
    assert done["sha256"] == again["sha256"] == digest.hexdigest()
    if call == "put":
        agent.call("get", vm="box", **there["get"])
    assert back.read_bytes() == source.read_bytes()
