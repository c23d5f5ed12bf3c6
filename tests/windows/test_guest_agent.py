"""A guest agent as a process of Windows, asked by an ordinary host agent: commands, output, copies, CPU time."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.agent_process import AgentProcess

from .wine import Wine, windows_path
from .wine_host_agent import ARGV

VM = "windows"


@pytest.fixture(scope="module")
def agent(wine: Wine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ARGV, json.dumps({"argv": wine.argv("-m", "guest_agent"), "environment": wine.environment}))
        agent = AgentProcess(tmp_path_factory.mktemp("windows"), module="tests.windows.wine_host_agent")
        agent.start()
        try:
            agent.start_vm(VM)
            yield agent
        finally:
            agent.end()


def python(wine: Wine, code: str, *words: str) -> list[str]:
    return [windows_path(wine.python / "python.exe"), "-c", code, *words]


def run(agent: AgentProcess, argv: list[str], **args: Any) -> tuple[dict[str, Any], bytes]:
    """A program in the guest, to its end: how it ended, and what it printed."""
    out = agent.folder / "out"
    out.unlink(missing_ok=True)
    result = agent.call("run", vm=VM, argv=argv, stdout=str(out), **args)
    return result, out.read_bytes() if out.exists() else b""


def home(agent: AgentProcess) -> Path:
    return agent.home(VM)


def test_a_command_with_its_words_status_and_cpu_time(agent: AgentProcess, wine: Wine) -> None:
    words = ("two words", 'a "quote"', "back\\slash\\", "%PATH%", "\u00e4")
    code = (
        "import sys, time\nwhile time.process_time() < 0.5: pass\n"
        "sys.stdout.buffer.write(ascii(sys.argv[1:]).encode())\nsys.exit(7)"
    )
    result, out = run(agent, python(wine, code, *words))
    assert out.decode() == ascii(list(words))
    assert (result["outcome"], result["exit_code"]) == ("exited", 7)
    assert result["stdout_bytes"] == len(out)


def test_output_and_cpu_time_come_while_it_runs(agent: AgentProcess, wine: Wine) -> None:
    """The program goes on when its first words have arrived, and not before."""
    assert agent.client is not None
    told: list[tuple[str, dict[str, Any]]] = []
    ended: list[Any] = []
    gate = home(agent) / "gate"
    code = (
        "import pathlib, sys, time\nprint('first', flush=True)\nprint('wrong', file=sys.stderr, flush=True)\n"
        "while not pathlib.Path('gate').exists(): time.process_time(); time.sleep(0.05)\nprint('last')"
    )
    agent.client.start(
        "run",
        {"vm": VM, "argv": python(wine, code), "stream": True},
        lambda name, data: told.append((name, data)),
        lambda result, error: ended.append(result or error),
    )
    while not {"stdout", "stderr"} <= {data["stream"] for name, data in told if name == "output"}:
        agent.pump()
    while not any(name == "usage" and data["cpu_s"] > 0 and data["rss_bytes"] > 0 for name, data in told):
        agent.pump()
    assert not ended
    gate.touch()
    while not ended:
        agent.pump()
    text = b"".join(base64.b64decode(d["data"]) for n, d in told if n == "output" and d["stream"] == "stdout")
    assert text.split() == [b"first", b"last"]
    assert ended[0]["exit_code"] == 0
    assert ended[0]["user_s"] + ended[0]["system_s"] > 0


def test_much_output_is_complete_and_waits_for_its_reader(agent: AgentProcess, wine: Wine) -> None:
    code = "import sys\nfor n in range(400): sys.stdout.buffer.write(b'%07d\\n' % n * 1024)"
    result, out = run(agent, python(wine, code))
    assert result["stdout_bytes"] == len(out) == 400 * 8 * 1024
    assert out[:8] == b"0000000\n"
    assert out[-8:] == b"0000399\n"


def test_copies_both_ways(agent: AgentProcess, wine: Wine) -> None:
    source = agent.folder / "source"
    (source / "below").mkdir(parents=True)
    (source / "below" / "data").write_bytes(bytes(range(256)) * 4096)
    (source / "empty").touch()
    agent.call("put", vm=VM, source=str(source), destination="in/tree")
    code = (
        "import pathlib\np = pathlib.Path('in/tree/below/data')\n"
        "pathlib.Path('out').mkdir()\npathlib.Path('out/turned').write_bytes(p.read_bytes()[::-1])"
    )
    assert run(agent, python(wine, code))[0]["exit_code"] == 0
    back = agent.folder / "back"
    agent.call("get", vm=VM, source="out", destination=str(back))
    assert (back / "turned").read_bytes() == bytes(reversed(range(256))) * 4096
    assert (home(agent) / "in/tree/empty").is_file()


def test_a_whole_tree_stands_still_goes_on_and_is_ended(agent: AgentProcess, wine: Wine) -> None:
    """The program starts another; both write. What counts is what they do, not what the system says of them."""
    tick = (
        "import sys, time\nn = 0\nwhile True:\n    n += 1\n"
        "    with open(sys.argv[1], 'w') as file: file.write(str(n))\n    time.sleep(0.05)"
    )
    code = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {tick!r}, 'child'])\nexec({tick!r})"
    assert agent.client is not None
    ended: list[Any] = []
    agent.client.start(
        "run",
        {"vm": VM, "command": "tree", "argv": python(wine, code, "parent")},
        None,
        lambda result, error: ended.append(result or error),
    )

    def ticks() -> tuple[str, ...]:
        return tuple((home(agent) / name).read_text() for name in ("parent", "child") if (home(agent) / name).exists())

    until(lambda: len(ticks()) == 2)
    agent.call("signal", vm=VM, command="tree", signal="STOP")
    until(lambda: stands_still(ticks))
    agent.call("signal", vm=VM, command="tree", signal="CONT")
    before = ticks()
    until(lambda: all(one != other for one, other in zip(before, ticks(), strict=True)))
    agent.call("signal", vm=VM, command="tree", signal="TERM")
    while not ended:
        agent.pump()
    assert (ended[0]["outcome"], ended[0]["signal"]) == ("signalled", "TERM")
    until(lambda: stands_still(ticks))


def test_a_deadline_ends_it(agent: AgentProcess, wine: Wine) -> None:
    result, _ = run(agent, python(wine, "import time; time.sleep(600)"), deadline_s=3.0)
    assert result["outcome"] == "deadline"


def test_a_batch_file_gets_its_words(agent: AgentProcess) -> None:
    (home(agent) / "a batch.cmd").write_bytes(b"@echo off\r\necho [%1] [%2] %~nx0\r\nexit /b 5\r\n")
    program = windows_path(home(agent) / "a batch.cmd")
    result, out = run(agent, [program, "two words", "a&echo b"])
    assert out.decode().strip() == '["two words"] ["a&echo b"] a batch.cmd'
    assert result["exit_code"] == 5
    result, _ = run(agent, [program, "%PATH%"])
    assert result["outcome"] == "not_started"
    assert "a batch file cannot be given the word" in result["reason"]


def test_what_cannot_be_started_says_why(agent: AgentProcess) -> None:
    result, _ = run(agent, ["nonesuch.exe"])
    assert result["outcome"] == "not_started"
    assert "nonesuch.exe" in result["reason"]


def until(what: Callable[[], object], deadline_s: float = 60.0) -> None:
    end = time.monotonic() + deadline_s
    while not what():
        assert time.monotonic() < end, "never"
        time.sleep(0.1)


def stands_still(ticks: Callable[[], tuple[str, ...]]) -> bool:
    before = ticks()
    time.sleep(1.0)  # twenty of its steps; nothing says that nothing happens
    return ticks() == before
