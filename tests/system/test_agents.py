"""Commands and copies through the real broker, link, agents and keeper."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from common.errors import TransferError, VMwrapperError
from common.files import endpoints_dir

from .conftest import Laptop, ignore

DEADLINE = 60.0  # seconds for anything here


def within(deferred: Any) -> Any:
    return Deferred.fromCoroutine(deferred).addTimeout(DEADLINE, reactor)


def agent_and_keeper(laptop: Laptop) -> list[int]:
    """The processes of this guest, its process 1 among them, among those of other tests on the machine."""
    found = psutil.process_iter(["cmdline"])
    return [each.pid for each in found if str(laptop.home) in (each.info["cmdline"] or [])]


@pytest_twisted.ensureDeferred
async def test_output_exit_code_and_use_of_a_command(laptop: Laptop) -> None:
    result = await within(laptop.run("sh", "-c", "echo out; echo err >&2; exit 7", stdout=str(laptop.host / "out")))
    assert (result["outcome"], result["exit_code"]) == ("exited", 7)
    assert laptop.output() == b"out\n"
    assert laptop.output("stderr") == b"err\n"
    assert (laptop.host / "out").read_bytes() == b"out\n"
    assert (result["stdout_bytes"], result["stderr_bytes"]) == (4, 4)
    assert result["max_rss_bytes"] > 100_000
    assert 0 < result["wall_s"] < DEADLINE


@pytest_twisted.ensureDeferred
async def test_output_comes_while_the_command_runs(laptop: Laptop) -> None:
    first: Deferred[None] = Deferred()
    go_on = laptop.home / "go-on"

    def update(name: str, data: dict[str, Any]) -> None:
        if name == "output" and not first.called:
            first.callback(None)

    script = "echo one; until [ -e go-on ]; do sleep 0.05; done; echo two"
    running = laptop.operations.run({"vm": "lap", "argv": ["sh", "-c", script], "stream": True}, update)
    await first.addTimeout(DEADLINE, reactor)
    assert not running.called
    go_on.touch()
    assert (await running.addTimeout(DEADLINE, reactor))["stdout_bytes"] == len("one\ntwo\n")


@pytest_twisted.ensureDeferred
async def test_much_output_arrives_whole_and_in_order(laptop: Laptop) -> None:
    await within(laptop.run("seq", "1000000", stdout=str(laptop.host / "numbers")))
    expected = b"".join(b"%d\n" % number for number in range(1, 1_000_001))
    assert (laptop.host / "numbers").read_bytes() == expected


@pytest_twisted.ensureDeferred
async def test_stdin_environment_and_working_directory(laptop: Laptop) -> None:
    (laptop.home / "sub").mkdir()
    (laptop.home / "input").write_text("hello")
    result = await within(
        laptop.run("sh", "-c", 'cat; printf " $COLOUR "; pwd', env={"COLOUR": "red"}, cwd="sub", stdin="input")
    )
    assert result["exit_code"] == 0
    assert laptop.output().decode() == f"hello red {laptop.home / 'sub'}\n"


@pytest_twisted.ensureDeferred
async def test_arguments_reach_the_program_as_they_are(laptop: Laptop) -> None:
    hostile = ["$(touch owned)", "; rm -rf x", "a b", "'", '"', "*", "\n", "é"]
    await within(laptop.run("printf", "%s|", *hostile))
    assert laptop.output().decode() == "|".join(hostile) + "|"
    assert not (laptop.home / "owned").exists()


@pytest.mark.parametrize(
    ("argv", "args", "reason"),
    [
        (["./nothing"], {}, "No such file"),
        (["/etc/passwd"], {}, "Permission denied"),
        (["true"], {"cwd": "nowhere"}, "no directory"),
        (["true"], {"cwd": "../.."}, "relative path"),
        (["true"], {"stdin": "nothing"}, "No such file"),
        (["true"], {"stdin": "/etc/passwd"}, "relative path"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_what_cannot_be_started_says_why(
    laptop: Laptop, argv: list[str], args: dict[str, str], reason: str
) -> None:
    result = await within(laptop.run(*argv, **args))
    assert result["outcome"] == "not_started"
    assert reason in result["reason"]


@pytest_twisted.ensureDeferred
async def test_a_signal_reaches_the_whole_process_group(laptop: Laptop) -> None:
    ids: Deferred[str] = Deferred()

    def update(name: str, data: dict[str, Any]) -> None:
        if name == "started":
            ids.callback(data["command"])

    seconds = str(300 + os.getpid() / 10**7)  # a sleep that no other test has
    running = laptop.operations.run({"vm": "lap", "argv": ["sh", "-c", f"sleep {seconds} & wait"]}, update)
    command = await ids.addTimeout(DEADLINE, reactor)
    laptop.operations.signal({"command": command, "signal": "TERM"}, ignore)
    result = await running.addTimeout(DEADLINE, reactor)
    assert (result["outcome"], result["signal"]) == ("signalled", "TERM")
    left = [each for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"] == ["sleep", seconds]]
    assert psutil.wait_procs(left, DEADLINE)[1] == []  # each takes the signal when it has its turn


@pytest_twisted.ensureDeferred
async def test_a_deadline_kills_the_command(laptop: Laptop) -> None:
    result = await within(laptop.run("sleep", "600", deadline_s=0.3))
    assert result["outcome"] == "deadline"


@pytest_twisted.ensureDeferred
async def test_a_process_left_behind_does_not_hold_up_the_end(laptop: Laptop) -> None:
    result = await within(laptop.run("sh", "-c", "sleep 400 & echo $!"))
    assert result["outcome"] == "exited"
    os.kill(int(laptop.output()), signal.SIGKILL)


@pytest_twisted.ensureDeferred
async def test_a_command_that_is_asked_for_twice_runs_once(laptop: Laptop) -> None:
    again = {"command": "c-twice"}
    await within(laptop.run("sh", "-c", "echo x >> effects", **again))
    result = await within(laptop.run("sh", "-c", "echo x >> effects", **again))
    assert result["outcome"] == "exited"
    assert (laptop.home / "effects").read_text() == "x\n"


@pytest_twisted.ensureDeferred
async def test_cpu_time_and_fraction_done_are_told_while_it_runs(laptop: Laptop) -> None:
    fractions: list[float] = []

    def update(name: str, data: dict[str, Any]) -> None:
        if name == "fraction":
            fractions.append(data["fraction"])
            (laptop.home / f"told-{data['fraction']}").touch()
        if name == "usage" and data["cpu_s"] > 0.5:
            (laptop.home / "told-cpu").touch()

    burn = f"{sys.executable} -c 'import time\nwhile time.process_time() < 0.8: pass'"
    told = "until [ -e told-{} ]; do sleep 0.05; done"
    steps = ["echo 0.25 > done.txt", told.format(0.25), burn, told.format("cpu"), "echo 0.75 > done.txt"]
    script = "; ".join([*steps, told.format(0.75)])
    request = {"vm": "lap", "argv": ["sh", "-c", script], "stream": True, "fraction_file": "done.txt"}
    result = await laptop.operations.run(request, update).addTimeout(DEADLINE, reactor)
    assert result["exit_code"] == 0
    assert (fractions[0], fractions[-1]) == (0.25, 0.75)


@pytest_twisted.ensureDeferred
async def test_the_way_to_the_network_is_named_and_closed_until_it_is_opened(laptop: Laptop, tmp_path: Path) -> None:
    ask = (
        "import os, urllib.request as r\n"
        "assert os.environ['http_proxy'] == os.environ['https_proxy']\n"
        "try: r.urlopen('http://192.0.2.7/', timeout=10)\n"
        "except Exception as e: print(getattr(e, 'code', 'no'))\n"
    )
    assert (await within(laptop.run(sys.executable, "-c", ask)))["exit_code"] == 1
    assert b"KeyError" in laptop.output("stderr"), "without it nothing is named"
    start = {"vm": "net", "directory": str(tmp_path / "vms"), "network": True, "deadline_s": 30}
    await within(laptop.operations.start_vm(start, lambda name, data: None))
    for limits, expected in (({}, b"no"), ({"network": True}, b"403"), ({"network": False}, b"no")):
        laptop.operations.limit_vm({"vm": "net", **limits}, lambda name, data: None)
        laptop.events.clear()
        await within(laptop.run(sys.executable, "-c", ask, vm="net"))
        assert laptop.output() == b"%b\n" % expected, laptop.output("stderr")
    (described,) = [vm for vm in laptop.operations.vms({}, lambda n, d: None)["vms"] if vm["vm"] == "net"]
    assert described["sent_bytes"] > 50
    assert described["wall_s"] > 0 and described["paused_s"] == 0


@pytest_twisted.ensureDeferred
async def test_the_agent_can_be_killed_while_a_command_runs(laptop: Laptop) -> None:
    """Its keeper goes on; a new agent finds the command, and the output has neither gap nor repeat."""
    started: Deferred[None] = Deferred()

    def update(name: str, data: dict[str, Any]) -> None:
        if name == "output" and not started.called:
            started.callback(None)

    vm = laptop.agent._vms.get("lap")
    assert vm is not None
    machine: Any = vm.machine
    script = "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do echo $i; sleep 0.1; done"
    args = {"vm": "lap", "argv": ["sh", "-c", script], "stdout": str(laptop.host / "out")}
    running = laptop.operations.run({**args, "stream": True}, update)
    await started.addTimeout(DEADLINE, reactor)
    machine.restart_agent()
    result = await running.addTimeout(DEADLINE, reactor)
    assert (result["outcome"], result["exit_code"]) == ("exited", 0)
    assert (laptop.host / "out").read_text().split() == [str(number) for number in range(1, 21)]


@pytest_twisted.ensureDeferred
async def test_files_and_trees_go_in_and_come_back(laptop: Laptop) -> None:
    tree = laptop.host / "tree"
    (tree / "deep" / "er").mkdir(parents=True)
    (tree / "deep" / "big").write_bytes(os.urandom(3_000_000))
    (tree / "empty").touch()
    (tree / "run").write_text("#!/bin/sh\n")
    (tree / "run").chmod(0o755)
    done = await within(laptop.put(tree, "there/tree"))
    assert done["files"] == 3
    assert os.access(laptop.home / "there/tree/run", os.X_OK)
    back = await within(laptop.get("there/tree", laptop.host / "back"))
    assert back["sha256"] == done["sha256"]
    assert (laptop.host / "back/deep/big").read_bytes() == (tree / "deep/big").read_bytes()
    assert sorted(path.name for path in laptop.host.iterdir()) == ["back", "tree"]


@pytest.mark.parametrize("size", [0, 1, 8000, 8192, 100_000, 1_048_576, 1_048_577, 5_000_000])
@pytest_twisted.ensureDeferred
async def test_a_file_of_any_size_arrives_without_a_pause(laptop: Laptop, size: int) -> None:
    source = laptop.host / "file"
    source.write_bytes(os.urandom(size))
    done = await within(laptop.put(source, "file"))
    assert (laptop.home / "file").read_bytes() == source.read_bytes()
    assert done["seconds"] < 10  # a third of the time after which a socket is given up


@pytest_twisted.ensureDeferred
async def test_a_copy_goes_on_after_its_connection_was_cut(laptop: Laptop) -> None:
    source = laptop.host / "big"
    source.write_bytes(os.urandom(64 * 1024 * 1024))
    vm = laptop.agent._vms.get("lap")
    assert vm is not None
    machine: Any = vm.machine
    cuts: list[int] = []

    def progress(name: str, data: dict[str, Any]) -> None:
        if len(cuts) < 3 and data["bytes"] > len(cuts) * 16 * 1024 * 1024:
            cuts.append(data["bytes"])
            reactor.callLater(0, machine.cut_connections)

    request = {"vm": "lap", "source": str(source), "destination": "big"}
    await laptop.operations.put(request, progress).addTimeout(DEADLINE, reactor)
    assert (laptop.home / "big").read_bytes() == source.read_bytes()
    assert len(cuts) == 3


@pytest.mark.parametrize(
    ("path", "reason"), [("../x", "relative"), ("/etc/passwd", "relative"), ("nothing", "no nothing")]
)
@pytest_twisted.ensureDeferred
async def test_a_copy_of_a_bad_path_says_why(laptop: Laptop, path: str, reason: str) -> None:
    with pytest.raises(TransferError, match=reason):
        await within(laptop.get(path, laptop.host / "x"))
    assert not list(laptop.host.iterdir())


@pytest_twisted.ensureDeferred
async def test_ping(laptop: Laptop) -> None:
    assert 0 < (await within(laptop.operations.ping({"vm": "lap"}, ignore)))["round_trip_s"] < DEADLINE


@pytest_twisted.ensureDeferred
async def test_the_end_of_a_vm_ends_what_waits_for_it(laptop: Laptop) -> None:
    vm = laptop.agent._vms.get("lap")
    assert vm is not None
    running = laptop.operations.run({"vm": "lap", "argv": ["sleep", "500"]}, ignore)
    await deferLater(reactor, 0)
    await vm.machine.power_off()  # type: ignore[union-attr]
    result = await running.addTimeout(DEADLINE, reactor)
    assert result["outcome"] == "lost"
    assert "lap" in result["reason"]


@pytest_twisted.ensureDeferred
async def test_an_unknown_vm_is_named_in_the_error(laptop: Laptop) -> None:
    with pytest.raises(VMwrapperError, match="No VM is named other"):
        await laptop.operations.ping({"vm": "other"}, ignore)


@pytest_twisted.ensureDeferred
async def test_nothing_is_left_after_the_end(laptop: Laptop, tmp_path: Path) -> None:
    pids = agent_and_keeper(laptop)
    assert len(pids) == 3  # with its process 1
    await laptop.agent.shut_down()
    for _ in range(1200):
        if not any(psutil.pid_exists(pid) for pid in pids):
            break
        await deferLater(reactor, 0.05)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not list(endpoints_dir().iterdir())
    assert not list((tmp_path / "vms").iterdir())
