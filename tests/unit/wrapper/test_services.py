"""What runs beside the tasks: VMmanage tasks are watched while they are needed, and ended whatever happened."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import psutil
import pytest

from host_agent.control_client import ControlClient
from host_agent.wrapper.agent_process import ManagedAgent, gives_host_agent
from host_agent.wrapper.events import Events
from host_agent.wrapper.host_task import HostTask, Watch
from host_agent.wrapper.job import Task, TaskKind
from host_agent.wrapper.resolve import Macros, application_path
from host_agent.wrapper.services import Services
from host_agent.wrapper.tasks import TaskError

TASK = Task(kind=TaskKind.MANAGE, line=1, number=1, application="sh", stdout_filename="o", stderr_filename="e")


@attrs.define
class StandInAgent:
    """Ready when a test says so."""

    ready: bool = False
    state_directory: str = ""

    def start(self) -> None: ...

    def client(self) -> ControlClient | None:
        return None

    def gets_on(self) -> None: ...

    def stop(self, keep: bool = False) -> None: ...


@pytest.fixture
def events() -> Iterator[Events]:
    events = Events()
    yield events
    events.close()


@pytest.fixture
def begin(events: Events, tmp_path: Path) -> Iterator[Callable[[str], tuple[Services, StandInAgent, list[str]]]]:
    """Start a VMmanage task with a script."""
    begun: list[Services] = []

    def start(script: str) -> tuple[Services, StandInAgent, list[str]]:
        watch = Watch(events.watch_until, lambda _pid: None, lambda _pid: None)
        manager = HostTask(
            TASK._replace(command_line=f'-c "{script}"'), tmp_path, Macros(slot=str(tmp_path)), watch, service=True
        )
        said: list[str] = []
        agent = StandInAgent()
        services = Services([], [manager], agent, events, said.append)
        begun.append(services)
        services.start()
        return services, agent, said

    yield start
    for services in begun:
        services.stop()


def until(events: Events, happens: Callable[[], bool]) -> None:
    for _ in range(60):
        if happens():
            return
        events.wait(1.0)
    raise AssertionError("it does not happen")


def check_until_it_fails(services: Services, events: Events) -> None:
    for _ in range(60):
        services.check()
        events.wait(1.0)


Begin = Callable[[str], tuple[Services, StandInAgent, list[str]]]


def test_one_that_prepares_something_may_end(begin: Begin, events: Events) -> None:
    services, agent, said = begin("exit 0")

    def noted() -> bool:
        services.check()
        return any("ended with exit status 0" in line for line in said)

    until(events, noted)
    agent.ready = True
    services.check()


def test_one_that_ends_while_virtual_machines_are_in_use_is_missed(
    begin: Begin, events: Events, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    services, agent, _ = begin("read line < fifo; echo the broker gives up >&2")
    agent.ready = True
    services.check()
    (tmp_path / "fifo").write_text("end\n")
    with pytest.raises(TaskError, match=r"VMmanage_task 1 \(sh\) ended with exit status 0.*\n.*gives up") as caught:
        check_until_it_fails(services, events)
    assert caught.value.passing


def test_one_that_fails_is_noticed_at_once(begin: Begin, events: Events) -> None:
    services, _, _ = begin("echo no port >&2; exit 3")
    with pytest.raises(TaskError, match=r"ended with exit status 3.*\n.*no port"):
        check_until_it_fails(services, events)


def test_whatever_they_left_behind_is_ended(begin: Begin, events: Events, tmp_path: Path) -> None:
    services, _, _ = begin("trap : TERM; setsid sleep 600 & echo $! > pid; wait; wait")
    until(events, lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
    pid = int((tmp_path / "pid").read_text())
    services.stop()
    assert not psutil.pid_exists(pid)


def test_waiting_for_a_host_agent_is_told_of_and_has_an_end(
    events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    said: list[str] = []
    agent = ManagedAgent(lambda: tmp_path, [], events, said.append)
    agent.start()
    assert agent.client() is None
    assert said == []
    now[0] += 11
    assert agent.client() is None
    assert agent.client() is None
    assert said == ["waiting for the job's VMmanage tasks: 11 s of at most 180 s"]
    now[0] += 170
    with pytest.raises(TaskError, match="gave no host agent in 180 s"):
        agent.client()


def test_the_seeds_own_controller_is_a_host_agent() -> None:
    task = TASK._replace(application="python", command_line="./boincvm/HostMain.py ./boincvm/HostConfig.cfg")
    assert gives_host_agent(task)
    assert not gives_host_agent(task._replace(command_line="./prepare.py"))


def test_python_is_found_under_the_name_that_it_has_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: Events
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python3").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(programs))
    task = TASK._replace(application="python", command_line="-c 'exit 0'")
    assert application_path(task, tmp_path, Macros()) == programs / "python3"
    said: list[str] = []
    watch = Watch(events.watch_until, lambda _pid: None, lambda _pid: None, said.append)
    running = HostTask(task, tmp_path, Macros(slot=str(tmp_path)), watch)
    running.run()
    running.kill()
    assert said == [f"VMmanage_task 1 (python): this host has no python, so it is run by {programs / 'python3'}"]
    (programs / "python").symlink_to("/bin/sh")
    assert application_path(task, tmp_path, Macros()) == programs / "python"
