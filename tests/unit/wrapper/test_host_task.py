"""Tasks on the host: their files, their process group, their CPU time and their end."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from host_agent.process_identity import start_mark
from host_agent.wrapper.events import Events
from host_agent.wrapper.host_task import HostTask, Watch
from host_agent.wrapper.job import Task, TaskKind
from host_agent.wrapper.leftovers import PROCESSES_FILE, Leftovers, kill_leftover
from host_agent.wrapper.process_tree import ProcessStat, descendants
from host_agent.wrapper.resolve import Macros
from host_agent.wrapper.tasks import TIME_LIMIT, TaskEnd, TaskError, TaskState, read_fraction

T = TypeVar("T")
TASK = Task(kind=TaskKind.TASK, line=1, number=1, application="sh")


@pytest.fixture
def events() -> Iterator[Events]:
    events = Events()
    yield events
    events.close()


def make(events: Events, slot: Path, script: str, service: bool = False, **fields: Any) -> HostTask:
    task = TASK._replace(command_line=f'-c "{script}"', stdout_filename="o", **fields)
    watch = Watch(events.watch_until, lambda _pid: None, lambda _pid: None)
    return HostTask(task, slot, Macros(slot=str(slot)), watch, service=service)


def finish(task: HostTask, events: Events) -> TaskEnd:
    """Wait for the end; each wait is ended by an event, not by its time."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        end = task.poll()
        if end is not None:
            return end
        events.wait(10)
    raise AssertionError("it does not end")


def test_files_are_appended_to(events: Events, tmp_path: Path) -> None:
    (tmp_path / "o").write_text("before\n")
    (tmp_path / "i").write_text("input\n")
    task = make(events, tmp_path, "cat; echo bad >&2; exit 4", stdin_filename="i", stderr_filename="e")
    task.run()
    end = finish(task, events)
    assert (end.exit_code, end.ok, end.sentence) == (4, False, "ended with exit status 4")
    assert (tmp_path / "o").read_text() == "before\ninput\n"
    assert task.error_tail() == "    bad"
    assert task.state is TaskState.DONE


def test_directory_environment_and_priority(events: Events, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    task = make(
        events,
        tmp_path,
        "pwd; echo $A$HOME; nice",
        exec_dir="$PWD/sub",
        setenv=("A=1", "PATH=/usr/bin:/bin"),
        priority=2,
    )
    task.run()
    assert finish(task, events).ok
    directory, words, nice = (tmp_path / "o").read_text().splitlines()
    assert (directory, words) == (str(tmp_path / "sub"), "1")
    assert int(nice) >= 10


def test_end_by_a_signal(events: Events, tmp_path: Path) -> None:
    task = make(events, tmp_path, "kill -9 $$")
    task.run()
    assert finish(task, events).sentence == "was ended by SIGKILL"


def test_suspend_resume_and_kill_reach_the_whole_tree(events: Events, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ready")
    task = make(events, tmp_path, "(setsid sleep 100 &) ; setsid sleep 100 & echo $! > ready; wait")
    task.run()
    (tmp_path / "ready").read_text()
    assert task._process is not None
    members = [each.pid for each in wait_for(lambda: sleepers(task))]
    assert len(members) == 2
    task.stop()
    task.stop()
    wait_for(lambda: {state_of(pid) for pid in members} == {"T"})
    assert task.poll() is None
    task.resume()
    wait_for(lambda: {state_of(pid) for pid in members} == {"S"})
    task.stop()
    task.kill()  # stopped or not
    assert task.state is TaskState.DONE
    for pid in members:
        wait_gone(pid)
    task.kill()  # twice is once


def sleepers(task: HostTask) -> list[ProcessStat]:
    """The two programs of the test above, once they run: one has a session of its own, one is an orphan too."""
    assert task._process is not None
    found = descendants(task._process.pid)
    alone = [each for each in found if each.session == each.pid]
    return alone if len(alone) == 2 else []


@pytest.mark.parametrize(("multi_process", "child"), [(False, "S"), (True, "T")])
def test_use_tstp(events: Events, tmp_path: Path, multi_process: bool, child: str) -> None:
    os.mkfifo(tmp_path / "ready")
    script = "trap 'echo stopped >> o2' TSTP; sleep 100 & echo $! > ready; while :; do wait; done"
    task = make(events, tmp_path, script, multi_process=multi_process)
    task.use_tstp = True
    task.run()
    pid = int((tmp_path / "ready").read_text())
    wait_for(lambda: Path(f"/proc/{pid}/comm").read_text() == "sleep\n")  # before that it has the shell's trap
    task.stop()
    wait_for(lambda: (tmp_path / "o2").exists())  # it was told, and sees to itself
    wait_for(lambda: state_of(pid) == child)
    task.kill()
    wait_gone(pid)


def test_tstp_stops_a_program_that_does_not_catch_it(events: Events, tmp_path: Path) -> None:
    task = make(events, tmp_path, "exec sleep 100")
    task.use_tstp = True
    task.run()
    assert task._process is not None
    leader = task._process.pid
    (root,) = wait_for(lambda: descendants(leader))
    task.stop()
    wait_for(lambda: state_of(root.pid) == "T")
    task.resume()
    wait_for(lambda: state_of(root.pid) == "S")
    task.kill()


def test_a_program_that_ends_takes_its_children_along_but_a_service_does_not(events: Events, tmp_path: Path) -> None:
    script = "sleep 100 & echo $! > pid"
    task = make(events, tmp_path, script)
    task.run()
    finish(task, events)
    wait_gone(int((tmp_path / "pid").read_text()))
    service = make(events, tmp_path, script, service=True)
    service.run()
    assert finish(service, events).ok
    child = int((tmp_path / "pid").read_text())
    assert state_of(child) not in ("", "Z")
    service.kill()
    wait_gone(child)


def test_cpu_time_of_children_counts(events: Events, tmp_path: Path) -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    (tmp_path / "burn.py").write_text(burn)
    task = make(events, tmp_path, f"{sys.executable} burn.py; exit 0")
    task.run()
    finish(task, events)
    assert 0.25 < task.cpu_seconds() < 3


@pytest.mark.parametrize("grouped", [True, False], ids=["as the system allows", "without a control group"])
def test_no_cpu_time_of_short_lived_children_is_lost(
    events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grouped: bool
) -> None:
    if not grouped:
        monkeypatch.setattr("common.cgroup.own_group", lambda: None)
    (tmp_path / "burn.py").write_text("import time\nwhile time.process_time() < 0.2: pass")
    # An orphan in a session of its own whose parent is gone before it ends, twice, one after the other.
    orphan = f"(setsid {sys.executable} -S burn.py; echo done >> ready) & exit"
    # Held open both ways: a reader that saw both words at once must not wait for a third.
    task = make(events, tmp_path, f"exec 3<> ready; for i in 1 2; do sh -c '{orphan}'; done; read a <&3; read a <&3")
    os.mkfifo(tmp_path / "ready")
    task.run()
    assert finish(task, events).ok
    assert 0.35 <= task.cpu_seconds() < 5


@pytest.mark.parametrize("how", ["as the system allows", "without a control group", "without lists of children"])
def test_the_leader_counts_while_the_program_runs(
    events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how != "as the system allows":
        monkeypatch.setattr("common.cgroup.own_group", lambda: None)
    if how == "without lists of children":
        monkeypatch.setattr("host_agent.wrapper.process_tree._walk", lambda _root: None)
    (tmp_path / "burn.py").write_text("import time\nwhile time.process_time() < 0.3: pass\nopen('burnt', 'w')")
    task = make(events, tmp_path, f"sh -c '{sys.executable} -S burn.py & exit'; exec sleep 100")
    task.run()
    wait_for(lambda: (tmp_path / "burnt").exists())
    process = task._process
    assert process is not None
    wait_for(lambda: process.cpu_seconds() >= 0.2)  # one that is reaped during a look is seen at the next
    task.kill()


def test_a_killed_leader_is_the_end_of_its_task(events: Events, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ready")
    task = make(events, tmp_path, "echo $$ > ready; exec sleep 100")
    task.run()
    pid = int((tmp_path / "ready").read_text())
    assert task._process is not None
    os.kill(task._process.pid, 9)
    assert finish(task, events).signal == "SIGKILL"
    wait_gone(pid)


def test_time_limit(events: Events, tmp_path: Path) -> None:
    task = make(events, tmp_path, "sleep 100")
    task.run()
    task.expire()
    end = task.poll()
    assert end is not None
    assert end.ok
    assert end.on_purpose == TIME_LIMIT


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"application": "./none"}, "there is no program './none' in the slot"),
        ({"application": "no-such-program"}, "there is no program 'no-such-program' in the slot or on PATH"),
        ({"application": "./plain"}, "'./plain' is not executable"),
        ({"application": "./text"}, "is not a program of this computer, and has no #! line"),
        ({"stdin_filename": "none"}, "there is no <stdin_filename> 'none' in the slot"),
        ({"exec_dir": "none"}, "<exec_dir> 'none' is not a directory"),
        ({"stderr_filename": "none/e"}, "none/e: No such file or directory"),
    ],
)
def test_what_cannot_be_started(events: Events, tmp_path: Path, fields: dict[str, Any], sentence: str) -> None:
    (tmp_path / "plain").write_text("#!/bin/sh\n")
    (tmp_path / "plain").chmod(0o644)
    (tmp_path / "text").write_text("just text\n")
    (tmp_path / "text").chmod(0o755)
    with pytest.raises(TaskError) as caught:
        make(events, tmp_path, "true", **fields).run()
    assert sentence in str(caught.value)


def test_the_end_wakes_the_loop_without_pidfd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    events = Events()
    try:
        task = make(events, tmp_path, "sleep 0.2")
        task.run()
        assert finish(task, events).ok
    finally:
        events.close()


def test_leftovers_are_ended_and_strangers_are_not(tmp_path: Path) -> None:
    ours = subprocess.Popen(["sleep", "100"], start_new_session=True)
    notes = Leftovers(tmp_path)
    notes.add(ours.pid)
    assert (tmp_path / PROCESSES_FILE).read_text().startswith(f"{ours.pid} ")
    assert not kill_leftover(ours.pid, start_mark(ours.pid) + "0")  # a later process with the same number
    assert not kill_leftover(ours.pid, "")
    assert ours.poll() is None
    assert Leftovers(tmp_path).end_all() == 1
    assert ours.wait(60) == -9
    assert not (tmp_path / PROCESSES_FILE).exists()


@pytest.mark.parametrize(
    ("text", "fraction"),
    [
        ("", 0.0),
        ("0.5", 0.5),
        ("0.1\n0.2\nrubbish\n", 0.2),
        ("7", 1.0),
        ("-1", 0.0),
        ("nan", 0.0),
        ("0.4 of 1", 0.4),
        ("0.25%\nabout 0.9", 0.25),
        ("0.3 " * 500, 0.3),
    ],
)
def test_fraction_file(tmp_path: Path, text: str, fraction: float) -> None:
    (tmp_path / "f").write_text(text)
    assert read_fraction(tmp_path / "f") == fraction
    assert read_fraction(tmp_path / "none") == 0.0


def wait_for(look: Callable[[], T], deadline_s: float = 30.0) -> T:
    """What `look` finds, once it finds something."""
    until = time.monotonic() + deadline_s
    while not (found := look()):
        assert time.monotonic() < until, "it does not happen"
        time.sleep(0.01)
    return found


def wait_gone(pid: int) -> None:
    """Until a process that is not our child has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert select.select([descriptor], [], [], 10)[0]
    os.close(descriptor)


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
