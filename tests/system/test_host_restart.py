"""A host agent that was killed and started again goes on where the one before it stood."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from host_agent.control_client import ControlError

from .agent_process import DEADLINE, AgentProcess, agent_process

COUNT = "echo x >> effects; for i in 1 2 3 4 5 6 7 8 9 10 11 12; do echo $i; sleep 0.25; done"
TWELVE = "".join(f"{number}\n" for number in range(1, 13))


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    with agent_process(tmp_path) as running:
        yield running


def wait_for(what: Any) -> None:
    """What happens in other processes, without a way to be told."""
    until = time.monotonic() + DEADLINE
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_running_command_and_its_output_go_on(agent: AgentProcess, tmp_path: Path) -> None:
    home = agent.start_vm("lap")
    out = tmp_path / "out"
    agent.begin("lap", "c-count", COUNT, stdout=str(out))
    wait_for(lambda: out.exists() and out.stat().st_size)
    agent.restart()
    wait_for(lambda: len(out.read_bytes()) > 4)
    agent.restart()
    result = agent.call("run", vm="lap", command="c-count", argv=["false"])
    assert (result["outcome"], result["exit_code"]) == ("exited", 0)
    assert out.read_text() == TWELVE
    assert (home / "effects").read_text() == "x\n"


def test_a_command_that_ends_while_no_host_agent_is_there(agent: AgentProcess, tmp_path: Path) -> None:
    home = agent.start_vm("lap")
    script = "echo before; until [ -e go ]; do sleep 0.05; done; echo after; touch ended"
    agent.begin("lap", "c-alone", script)
    agent.kill()
    (home / "go").touch()
    wait_for((home / "ended").exists)
    agent.start()
    pieces: dict[int, bytes] = {}

    def update(name: str, data: dict[str, Any]) -> None:
        if name == "output":
            import base64

            pieces[data["offset"]] = base64.b64decode(data["data"])

    assert agent.client is not None
    request = {"command": "c-alone", "stream": True, "stdout_from": 0}
    result = agent.client.call("attach", request, update, deadline_s=DEADLINE)
    assert result["exit_code"] == 0
    assert b"".join(data for _, data in sorted(pieces.items())) == b"before\nafter\n"


def test_results_are_known_after_a_restart(agent: AgentProcess) -> None:
    home = agent.start_vm("lap")
    first = agent.call("run", vm="lap", command="c-1", argv=["sh", "-c", "echo x >> effects; exit 5"])
    agent.restart()
    again = agent.call("run", vm="lap", command="c-1", argv=["sh", "-c", "echo x >> effects; exit 5"])
    assert again == first
    assert again["exit_code"] == 5
    assert (home / "effects").read_text() == "x\n"


@pytest.mark.parametrize("inwards", [True, False])
def test_a_copy_goes_on(agent: AgentProcess, tmp_path: Path, inwards: bool) -> None:
    home = agent.start_vm("lap")
    source = tmp_path / "source" if inwards else home / "source"
    destination = home / "big" if inwards else tmp_path / "big"
    source.write_bytes(os.urandom(96 * 1024 * 1024))
    call = "put" if inwards else "get"
    args = {"vm": "lap", "copy": "c-copy"}
    args |= (
        {"source": str(source), "destination": "big"}
        if inwards
        else {"source": "source", "destination": str(destination)}
    )
    assert agent.client is not None
    moved: list[int] = []
    agent.client.start(call, args, lambda name, data: moved.append(data["bytes"]))
    while not moved:
        agent.pump()
    agent.restart()
    done = agent.call(call, **args)
    assert done["bytes"] == source.stat().st_size
    assert destination.read_bytes() == source.read_bytes()
    assert not list(destination.parent.glob(".*.part"))


def test_the_reboot_of_a_guest_loses_what_ran_and_nothing_else(agent: AgentProcess) -> None:
    home = agent.start_vm("lap")
    agent.call("run", vm="lap", command="c-done", argv=["true"])
    agent.begin("lap", "c-lost", "sleep 600")
    (vm,) = agent.call("vms")["vms"]
    for process in psutil.process_iter(["cmdline"]):
        if str(home) in (process.info["cmdline"] or []) and process.pid != vm["pid"]:
            for child in process.children(recursive=True):
                child.kill()
            process.kill()
    result = agent.call("run", vm="lap", command="c-lost", argv=["true"])
    assert result["outcome"] == "lost"
    assert agent.call("run", vm="lap", argv=["true"])["exit_code"] == 0
    (after,) = agent.call("vms")["vms"]
    assert after["epoch"] == vm["epoch"] + 1


def test_a_vm_that_ended_meanwhile_is_told_and_removed(agent: AgentProcess, tmp_path: Path) -> None:
    home = agent.start_vm("lap")
    agent.begin("lap", "c-lost", "sleep 600")
    (vm,) = agent.call("vms")["vms"]
    agent.kill()
    os.kill(vm["pid"], signal.SIGKILL)
    for process in agent.left_over():
        process.kill()
    agent.start()
    assert agent.call("vms")["vms"] == []
    result = agent.call("attach", command="c-lost")
    assert result["outcome"] == "lost"
    assert "while no host agent was there" in result["reason"]
    assert not home.exists()


def test_a_state_directory_serves_one_agent_at_a_time(agent: AgentProcess, tmp_path: Path) -> None:
    second = AgentProcess(tmp_path)
    with pytest.raises(AssertionError, match="in use by another host agent"):
        second.start()
    assert agent.call("vms") == {"vms": []}


def test_nothing_is_left_after_an_orderly_end(agent: AgentProcess, tmp_path: Path) -> None:
    agent.start_vm("lap")
    agent.restart()
    agent.end()
    assert not agent.left_over()
    assert not list((tmp_path / "vms").iterdir())
    assert not (tmp_path / "state").exists()
    assert not list((tmp_path / "run" / "vms").iterdir())


def test_one_output_file_for_two_streams_is_refused(agent: AgentProcess, tmp_path: Path) -> None:
    agent.start_vm("lap")
    with pytest.raises(ControlError, match="cannot both"):
        agent.call("run", vm="lap", argv=["true"], stdout=str(tmp_path / "o"), stderr=str(tmp_path / "o"))
