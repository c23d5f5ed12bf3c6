"""The keeper as a real process, spoken to over its socket."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from guest_agent import keeper
from guest_agent.keeper import _LENGTH, pack, start_keeper, unpack

DEADLINE = 60.0  # seconds


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.01)


class Agent:
    """The agent's end of the conversation."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(DEADLINE)
        self.socket.connect(str(path))
        self.state = self.hear()[0]

    def say(self, **head: Any) -> None:
        self.socket.sendall(pack(head))

    def spawn(
        self, command: str, *argv: str, deadline: float = 0.0, cwd: Path = Path("/"), stdin: str = "", path: str = ""
    ) -> None:
        env = {"PATH": path} if path else {}
        self.say(op="spawn", id=command, argv=argv, env=env, cwd=str(cwd), stdin=stdin, deadline=deadline)

    def hear(self) -> tuple[dict[str, Any], bytes]:
        (length,) = _LENGTH.unpack(self._take(_LENGTH.size))
        return unpack(self._take(length))

    def hear_until(self, op: str) -> tuple[dict[str, Any], bytes]:
        """Listen until `op`; returns it and all output before it."""
        output = b""
        while True:
            head, payload = self.hear()
            if head["op"] == op:
                return head, output
            output += payload

    def _take(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            assert piece, "the keeper closed the connection"
            data += piece
        return data


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("k") / "s"
    start_keeper(path)
    wait_for(path.exists)
    yield path
    if path.exists():
        Agent(path).say(op="quit")
        wait_for(lambda: not path.exists())


def test_output_and_end_of_a_command(path: Path) -> None:
    agent = Agent(path)
    agent.spawn("c", "sh", "-c", "echo hello; exit 4")
    ended, output = agent.hear_until("ended")
    assert (ended["outcome"], ended["exit_code"], output) == ("exited", 4, b"hello\n")


def test_where_a_program_is_and_what_it_reads(path: Path, tmp_path: Path) -> None:
    agent = Agent(path)
    (tmp_path / "said").write_text("words\n")
    (tmp_path / "mine").write_text("#!/bin/sh\npwd; cat\n")
    (tmp_path / "mine").chmod(0o755)
    for program, where in (("./mine", ""), ("mine", f"/nowhere:{tmp_path}:/usr/bin:/bin")):
        agent.spawn(f"c{len(where)}", program, cwd=tmp_path, stdin=str(tmp_path / "said"), path=where)
        ended, output = agent.hear_until("ended")
        assert (ended["exit_code"], output.decode()) == (0, f"{tmp_path}\nwords\n")
    for number, (program, why) in enumerate(
        (("mine", "mine: No such file"), (str(tmp_path / "said"), "said: Permission denied"), ("/bin/true", "no direc"))
    ):
        agent.spawn(f"c-{number}", program, cwd=tmp_path if number < 2 else tmp_path / "absent")
        assert why in agent.hear_until("refused")[0]["reason"], "in the working directory alone it is not found"


def test_a_program_has_nothing_that_is_open_here_but_its_own_three(tmp_path: Path) -> None:
    kept = os.dup(0)
    os.set_inheritable(kept, True)  # as whoever started the agent may have left one
    start_keeper(tmp_path / "s")
    os.close(kept)
    wait_for((tmp_path / "s").exists)
    agent = Agent(tmp_path / "s")
    script = "readlink /proc/$$/fd/0; ls /proc/$$/fd; ps -o pid= -o pgid= -o sid= -o ignored= $$"
    agent.spawn("c", "sh", "-c", script)
    words = agent.hear_until("ended")[1].decode().split()
    assert words[0] == "/dev/null"
    assert words[1:-4] == ["0", "1", "2"]
    assert len(set(words[-4:-1])) == 1, "it leads a session of its own"
    assert int(words[-1], 16) & 1 << signal.SIGPIPE - 1 == 0
    agent.say(op="quit")
    wait_for(lambda: not (tmp_path / "s").exists())


def test_a_command_outlives_its_agent_and_its_output_is_kept(path: Path) -> None:
    first = Agent(path)
    first.spawn("c", "sh", "-c", "echo one; read x < /dev/null; sleep 0.2; echo two")
    first.hear_until("output")
    first.socket.close()
    second = Agent(path)
    assert [command["id"] for command in second.state["commands"]] == ["c"]
    second.say(op="seek", id="c", stdout=0, stderr=0)
    second.hear_until("sought")  # what came before is of no account
    ended, output = second.hear_until("ended")
    assert output == b"one\ntwo\n"
    assert ended["stdout_bytes"] == len(output)


def test_what_is_acknowledged_is_not_sent_again(path: Path) -> None:
    first = Agent(path)
    first.spawn("c", "echo", "hello")
    first.hear_until("ended")
    first.say(op="ack", id="c", stream="stdout", offset=4)
    first.socket.close()
    second = Agent(path)
    assert second.state["commands"][0]["stdout"] == 4
    second.say(op="seek", id="c", stdout=4, stderr=0)
    second.hear_until("sought")
    assert second.hear_until("ended")[1] == b"o\n"


def test_a_program_waits_while_nobody_takes_its_output(path: Path) -> None:
    agent = Agent(path)
    agent.spawn("c", "sh", "-c", "head -c 20000000 /dev/zero")
    got = 0
    while got < 20_000_000:
        head, payload = agent.hear()
        if head["op"] == "output":
            got += len(payload)
            agent.say(op="ack", id="c", stream="stdout", offset=got)
    assert agent.hear_until("ended")[0]["stdout_bytes"] == got


def test_quit_ends_every_command_though_the_agent_has_gone(path: Path) -> None:
    agent = Agent(path)
    agent.spawn("first", "sleep", "600")
    pid = agent.hear_until("started")[0]["pid"]
    parent = psutil.Process(pid).parent()
    assert parent is not None
    os.kill(parent.pid, signal.SIGSTOP)  # so that all of this lies before it at once
    agent.spawn("second", "sleep", "601")
    agent.say(op="quit")
    agent.socket.close()
    os.kill(parent.pid, signal.SIGCONT)
    wait_for(lambda: not psutil.pid_exists(pid) and not path.exists())


def test_a_deadline_is_kept(path: Path) -> None:
    agent = Agent(path)
    agent.spawn("c", "sleep", "602", deadline=0.1)
    assert agent.hear_until("ended")[0]["outcome"] == "deadline"


def test_of_a_program_that_ends_at_once_only_the_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "STARTED_AFTER", 1.0)  # on a busy machine too, that is at once
    start_keeper(tmp_path / "s")
    wait_for((tmp_path / "s").exists)
    agent = Agent(tmp_path / "s")
    agent.spawn("short", "true")
    heard = [agent.hear()[0]]
    assert [head["op"] for head in heard] == ["ended"]
    assert heard[0]["pid"] > 0
    agent.spawn("long", "sleep", "604")
    started = agent.hear()[0]
    assert started["op"] == "started"
    agent.say(op="signal", id="long", signal="KILL")
    ended = agent.hear()[0]
    assert (ended["op"], ended["pid"]) == ("ended", started["pid"])


def test_many_are_forgotten_with_one_word(path: Path) -> None:
    agent = Agent(path)
    for number in range(5):
        agent.spawn(f"c-{number}", "true")
    for _ in range(5):
        agent.hear_until("ended")
    agent.spawn("running", "sleep", "603")
    agent.hear_until("started")
    agent.say(op="forget", ids=[*(f"c-{number}" for number in range(5)), "running"])
    agent.socket.close()
    assert [command["id"] for command in Agent(path).state["commands"]] == ["running"]


def test_it_waits_longer_for_its_first_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent may have to wait for its settings before it has any use for its keeper."""
    monkeypatch.setattr(keeper, "IDLE_EXIT", 0.05)
    start_keeper(tmp_path / "s")
    wait_for((tmp_path / "s").exists)
    time.sleep(0.3)  # longer than it waits for one that has gone
    agent = Agent(tmp_path / "s")
    agent.spawn("c", "true")  # one that has ended is not waited for
    agent.hear_until("ended")
    agent.socket.close()
    wait_for(lambda: not (tmp_path / "s").exists())


def test_what_was_due_while_a_program_runs_wakes_nobody_after_its_end(tmp_path: Path) -> None:
    idle = keeper.Keeper(tmp_path / "s")
    agent, other = socket.socketpair()
    idle._agent = agent
    child: Any = SimpleNamespace(running=True)
    for seconds in (5.0, 1000.0):
        idle._after(seconds, lambda: None, child)
    assert 0 < (idle._wait_time() or 0) <= 5
    child.running = False
    assert idle._wait_time() is None
    idle._after(3.0, lambda: None)  # this one is due all the same
    assert 0 < (idle._wait_time() or 0) <= 3
    for each in (agent, other, idle._listener):
        each.close()
