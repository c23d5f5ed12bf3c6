"""One command for many guests: it reaches all that match, and answers come one by one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from .agent_process import DEADLINE, AgentProcess, agent_process


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    with agent_process(tmp_path_factory.mktemp("many")) as running:
        for name in ("worker-1", "worker-2", "worker-3", "other"):
            running.start_vm(name)
        yield running


def vmctl_run(agent: AgentProcess, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "host_agent.vmctl.main", "run", *words]
    env = {**os.environ, "VMWRAPPER_RUNTIME": str(agent.folder / "run")}
    return subprocess.run(argv, capture_output=True, text=True, env=env, timeout=DEADLINE, check=False)


def test_all_that_match_answer_with_their_names(agent: AgentProcess) -> None:
    done = vmctl_run(agent, "worker-*", "--", "sh", "-c", "echo one; echo two")
    assert done.returncode == 0, done.stderr
    expected = [f"worker-{n}: {word}" for n in (1, 2, 3) for word in ("one", "two")]
    assert sorted(done.stdout.splitlines()) == sorted(expected)
    assert "3 of 3" in done.stderr


def test_a_quick_guest_does_not_wait_for_a_slow_one(agent: AgentProcess) -> None:
    assert agent.client is not None
    slow = agent.home("worker-2") / "slow"
    slow.touch()
    answers: list[str] = []
    ended: list[object] = []

    def update(name: str, data: dict[str, object]) -> None:
        if name == "answer":
            answers.append(str(data["vm"]))

    request = {"pattern": "worker-?", "argv": ["sh", "-c", "while [ -e slow ]; do sleep 0.05; done"]}
    agent.client.start("run_many", request, update, lambda result, error: ended.append(result or error))
    while len(answers) < 2:
        agent.pump()
    assert sorted(answers) == ["worker-1", "worker-3"]
    assert not ended
    slow.unlink()
    while not ended:
        agent.pump()
    assert ended == [{"matched": 3}]
    assert answers[2] == "worker-2"


def test_where_it_failed_is_said(agent: AgentProcess) -> None:
    (agent.home("worker-3") / "bad").touch()
    done = vmctl_run(agent, "worker-*", "--", "sh", "-c", "test ! -e bad || exit 7")
    assert done.returncode == 1
    assert "worker-3: ended with exit code 7" in done.stderr
    assert "2 of 3" in done.stderr


def test_a_pattern_that_matches_nothing_says_so(agent: AgentProcess) -> None:
    done = vmctl_run(agent, "nothing-*", "--", "true")
    assert done.returncode == 1
    assert "no VM has a name like nothing-*" in done.stderr
