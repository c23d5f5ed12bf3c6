"""Tasks on the host: their files, their process group, their CPU time and their end."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from host_agent.wrapper.events import Events
from host_agent.wrapper.host_task import HostTask, Watch
from host_agent.wrapper.host_task_posix import kill_leftover, start_mark
from host_agent.wrapper.job import Task, TaskKind
from host_agent.wrapper.leftovers import PROCESSES_FILE, Leftovers
from host_agent.wrapper.resolve import Macros
from host_agent.wrapper.tasks import TaskEnd, TaskError, TaskState, read_fraction

TASK = Task(kind=TaskKind.TASK, line=1, number=1, application="sh")


@pytest.fixture
def events() -> Iterator[Events]:
    events = Events()
    yield events
    events.close()


def make(events: Events, slot: Path, script: str, service: bool = False, **fields: Any) -> HostTask:
    task = attrs.evolve(TASK, command_line=f'-c "{script}"', stdout_filename="o", **fields)
    watch = Watch(events.watch_child, lambda _pid: None, lambda _pid: None)
    return HostTask(task, slot, Macros(slot=str(slot)), watch, service=service)


def finish(task: HostTask, events: Events) -> TaskEnd:
    """Wait for the end; each wait is ended by an event, not by its time."""
    for _ in range(100):
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


def test_suspend_resume_and_kill_reach_the_whole_session(events: Events, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ready")
    task = make(events, tmp_path, "sleep 100 & echo $! > ready; wait")
    task.run()
    child = int((tmp_path / "ready").read_text())
    task.stop()
    task.stop()
    assert task._process is not None
    os.waitid(os.P_PID, task._process.pid, os.WSTOPPED)
    assert state_of(child) == "T"
    assert task.poll() is None
    task.resume()
    os.waitid(os.P_PID, task._process.pid, os.WCONTINUED)
    task.kill()
    assert task.state is TaskState.DONE
    wait_gone(child)
    task.kill()  # twice is once


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


def test_time_limit(events: Events, tmp_path: Path) -> None:
    task = make(events, tmp_path, "sleep 100")
    task.run()
    task.expire()
    end = task.poll()
    assert end is not None
    assert end.ok
    assert end.timed_out


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
    assert ours.wait(10) == -9
    assert not (tmp_path / PROCESSES_FILE).exists()


@pytest.mark.parametrize(
    ("text", "fraction"),
    [("", 0.0), ("0.5", 0.5), ("0.1\n0.2\nrubbish\n", 0.2), ("7", 1.0), ("-1", 0.0), ("nan", 0.0), ("0.3 " * 500, 0.3)],
)
def test_fraction_file(tmp_path: Path, text: str, fraction: float) -> None:
    (tmp_path / "f").write_text(text)
    assert read_fraction(tmp_path / "f") == fraction
    assert read_fraction(tmp_path / "none") == 0.0


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
