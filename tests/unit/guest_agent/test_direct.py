"""The keeper's work inside of the agent, with processes of this system in place of Windows' job objects."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from common.windows_job import command_line
from guest_agent.accounting import ProcessAccounts
from guest_agent.direct import DirectKeeper
from guest_agent.keeper import BUFFER


class Group:
    """What a job object does, done to a process group."""

    def __init__(self, name: str) -> None:
        self.pid = 0
        self.closed = False

    def terminate(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)

    def suspend(self) -> None:
        os.killpg(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.pid, signal.SIGCONT)

    def close(self) -> None:
        self.closed = True


def start(job: Group, argv: list[str], *, cwd: str, environment: dict[str, str], files: tuple[Any, ...]) -> Any:
    stdin, stdout, stderr = files
    process = subprocess.Popen(
        argv, cwd=cwd, env=environment, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True
    )
    job.pid = process.pid
    return process


class Reactor:
    """Calls in order, in this thread."""

    def __init__(self) -> None:
        self._calls: list[tuple[float, Callable[..., None], tuple[Any, ...]]] = []

    def callLater(self, delay: float, call: Callable[..., None], *args: Any) -> None:
        self._calls.append((time.monotonic() + delay, call, args))

    def callFromThread(self, call: Callable[..., None], *args: Any) -> None:
        self.callLater(0, call, *args)

    def run_until(self, what: Callable[[], object]) -> None:
        until = time.monotonic() + 30
        while not what():
            assert time.monotonic() < until
            now = time.monotonic()
            due = [each for each in self._calls if each[0] <= now]
            for each in due:
                self._calls.remove(each)
                each[1](*each[2])
            if not due:
                time.sleep(0.005)


class Heard:
    """The runner's place."""

    def __init__(self) -> None:
        self.said: list[tuple[dict[str, Any], bytes]] = []

    def keeper_state(self, connection: Any, keeper_id: str, commands: list[dict[str, Any]]) -> None:
        assert commands == []

    def kept(self, head: dict[str, Any], payload: bytes) -> None:
        self.said.append((head, payload))

    def heads(self, op: str) -> list[dict[str, Any]]:
        return [head for head, _ in self.said if head["op"] == op]

    def output(self, stream: str = "stdout") -> bytes:
        return b"".join(data for head, data in self.said if head["op"] == "output" and head["stream"] == stream)


class Keeping:
    def __init__(self) -> None:
        self.reactor = Reactor()
        self.heard = Heard()
        self.keeper = DirectKeeper(self.reactor, self.heard, ProcessAccounts(), start, Group)
        self.keeper.begin(lambda: None)

    def spawn(self, script: str, command: str = "c", deadline: float = 0) -> None:
        argv = ["sh", "-c", script]
        head = {"op": "spawn", "id": command, "argv": argv, "env": {}, "cwd": "/", "stdin": "", "deadline": deadline}
        self.keeper.tell(head)

    def ended(self) -> dict[str, Any]:
        self.reactor.run_until(lambda: self.heard.heads("ended"))
        return self.heard.heads("ended")[0]


@pytest.fixture
def keeping() -> Iterator[Keeping]:
    keeping = Keeping()
    yield keeping
    for program in keeping.keeper._programs.values():
        if program.result is None:
            program.job.terminate()


def test_output_and_status(keeping: Keeping) -> None:
    keeping.spawn("echo out; echo err >&2; exit 7")
    ended = keeping.ended()
    assert (ended["outcome"], ended["exit_code"]) == ("exited", 7)
    assert (ended["stdout_bytes"], ended["stderr_bytes"]) == (4, 4)
    assert (keeping.heard.output(), keeping.heard.output("stderr")) == (b"out\n", b"err\n")


def test_a_program_waits_when_nobody_takes_its_output(keeping: Keeping) -> None:
    size = 3 * BUFFER
    keeping.spawn(f"head -c {size} /dev/zero")
    keeping.reactor.run_until(lambda: len(keeping.heard.output()) >= BUFFER)
    time.sleep(0.2)  # nothing tells that no more comes
    keeping.reactor.run_until(lambda: True)
    assert len(keeping.heard.output()) < 2 * BUFFER
    acknowledged = 0

    def take() -> bool:
        nonlocal acknowledged
        if len(keeping.heard.output()) > acknowledged:
            acknowledged = len(keeping.heard.output())
            keeping.keeper.tell({"op": "ack", "id": "c", "stream": "stdout", "offset": acknowledged})
        return bool(keeping.heard.heads("ended"))

    keeping.reactor.run_until(take)
    assert len(keeping.heard.output()) == size


def test_a_new_host_agent_gets_the_rest_again(keeping: Keeping) -> None:
    keeping.spawn("echo one two")
    keeping.ended()
    keeping.heard.said.clear()
    keeping.keeper.tell({"op": "seek", "id": "c", "stdout": 4, "stderr": 0})
    assert keeping.ended()["stdout_bytes"] == 8
    assert keeping.heard.said[0][0]["op"] == "sought"
    assert keeping.heard.output() == b"two\n"


def test_signals_and_the_deadline(keeping: Keeping) -> None:
    keeping.spawn("sleep 600")
    keeping.reactor.run_until(lambda: keeping.heard.heads("started"))
    keeping.keeper.tell({"op": "signal", "id": "c", "signal": "TERM"})
    assert (keeping.ended()["outcome"], keeping.ended()["signal"]) == ("signalled", "TERM")
    keeping.spawn("sleep 600", "late", deadline=0.1)
    keeping.reactor.run_until(lambda: len(keeping.heard.heads("ended")) == 2)
    assert keeping.heard.heads("ended")[1]["outcome"] == "deadline"


def test_a_process_that_is_left_behind_holds_nothing_up(keeping: Keeping) -> None:
    keeping.spawn("sleep 5 & echo here")
    assert keeping.ended()["wall_s"] < 4
    assert keeping.heard.output() == b"here\n"


def test_what_cannot_be_started_and_what_is_forgotten(keeping: Keeping) -> None:
    keeping.keeper.tell(
        {"op": "spawn", "id": "x", "argv": ["/nonesuch"], "env": {}, "cwd": "/", "stdin": "", "deadline": 0}
    )
    keeping.reactor.run_until(lambda: keeping.heard.heads("refused"))
    assert "/nonesuch: No such file" in keeping.heard.heads("refused")[0]["reason"]
    keeping.spawn("exit 0")
    keeping.ended()
    job: Any = keeping.keeper._programs["c"].job
    keeping.keeper.tell({"op": "forget", "ids": ["c"]})
    keeping.reactor.run_until(lambda: job.closed)
    assert not keeping.keeper._programs


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["a b.exe", 'x"y', "c\\"], '"a b.exe" x\\"y c\\'),
        (["C:\\a b\\x.bat", "one two", "&calc"], 'cmd.exe /d /s /c ""C:\\a b\\x.bat" "one two" "&calc""'),
        (["X.CMD"], 'cmd.exe /d /s /c ""X.CMD""'),
    ],
)
def test_command_lines_of_windows(argv: list[str], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMSPEC", raising=False)
    assert command_line(argv) == line


@pytest.mark.parametrize("word", ['a"&calc', "%PATH%", "two\nlines"])
def test_a_word_that_a_batch_file_would_not_get_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match="cannot be given the word"):
        command_line(["x.bat", word])
    assert sys.executable in command_line([sys.executable, word])
