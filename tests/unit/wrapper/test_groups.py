"""Parallel groups: tasks that run at once, on the host and in VMs of a scripted host agent."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from host_agent.wrapper import main, step
from host_agent.wrapper.boinc.runtime import InitData, Leave, Status
from host_agent.wrapper.boinc.standalone import StandaloneRuntime
from host_agent.wrapper.job import JobError
from host_agent.wrapper.job_parse import parse_job
from host_agent.wrapper.main import build_wrapper
from host_agent.wrapper.options import Options
from host_agent.wrapper.state import StateFile

FAKE = Path(__file__).with_name("fake_agent.py")
MEET = "touch here-{me}; until [ -e here-{other} ]; do sleep 0.02; done; "


class Client(StandaloneRuntime):
    """A client that a test plays: `wish` is asked at each look."""

    def __init__(self, slot: Path) -> None:
        super().__init__(slot)
        self.wish: Callable[[], Status] = Status
        self.fractions: list[float] = []
        self.pids: set[int] = set()

    def init_data(self) -> InitData:
        return InitData(standalone=False, project_dir=str(self.slot))

    def poll(self) -> Status:
        return self.wish()

    def report(self, cpu_s: float, checkpoint_cpu_s: float, fraction: float, **more: float) -> None:
        self.fractions.append(fraction)
        self.pids.add(int(more.get("other_pid", 0)))


@pytest.fixture
def slot(tmp_path: Path) -> Path:
    slot = tmp_path / "slot"
    slot.mkdir()
    return slot


@pytest.fixture
def client(slot: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    client = Client(slot)
    monkeypatch.setattr(main, "connect", lambda *_args: client)
    monkeypatch.setattr(step, "TICK_S", 0.05)
    return client


def run(slot: Path, *plan: str) -> int:
    wrapper = build_wrapper(Options(), slot, [sys.executable, str(FAKE), str(slot.parent / "guest"), *plan])
    try:
        return int(wrapper.run())
    finally:
        wrapper.runtime.close()
        wrapper.events.close()
        wrapper.log.close()


def write_job(slot: Path, *tasks: tuple[str, str, str]) -> None:
    """Tasks as group, script and further tags; "$1" of a script is its name."""
    parts = []
    for number, (group, script, more) in enumerate(tasks, 1):
        (slot / f"t{number}.sh").write_text(f"#!/bin/sh\n{script}\n")
        (slot / f"t{number}.sh").chmod(0o755)
        tags = f"<parallel_group>{group}</parallel_group>" if group else ""
        if "<virtualmachine>" in more:
            tags += "<copy_app_to_VM>1</copy_app_to_VM>"
        parts.append(f"<task><application>./t{number}.sh</application>{tags}{more}</task>\n")
    (slot / "job.xml").write_text(f"<job_desc>\n{''.join(parts)}</job_desc>\n")


def in_vm(name: str, more: str = "") -> str:
    return f"<virtualmachine>{name}</virtualmachine>{more}"


def calls(slot: Path) -> list[tuple[str, dict[str, Any]]]:
    lines = (slot.parent / "calls").read_text().splitlines()
    return [(call, json.loads(args)) for call, _, args in (line.partition(" ") for line in lines)]


def log(slot: Path) -> str:
    return (slot / "stderr.txt").read_text()


def test_tasks_of_a_group_run_at_once_and_the_others_wait(slot: Path, client: Client) -> None:
    note = "echo {} >> order"
    write_job(
        slot,
        ("", note.format("first"), ""),
        ("g", MEET.format(me=1, other=2) + note.format("group"), "<weight>2</weight>"),
        ("g", MEET.format(me=2, other=1) + note.format("group"), "<weight>4</weight>"),
        ("", note.format("last"), ""),
    )
    assert run(slot) == 0
    assert (slot / "order").read_text().split() == ["first", "group", "group", "last"]
    assert (slot / "wrapper_checkpoint.txt").read_text().startswith("4 ")
    assert StateFile(slot).state.group_done == ()
    assert client.fractions[-1] == 1.0


def test_weights(slot: Path, client: Client) -> None:
    """Each task's own fraction, times its weight."""
    wait = "until [ -e go ]; do sleep 0.02; done"
    write_job(
        slot,
        ("g", f"echo 0.5 > f1; {wait}", "<weight>2</weight><fraction_done_filename>f1</fraction_done_filename>"),
        ("g", f"echo 0.25 > f2; {wait}", "<weight>4</weight><fraction_done_filename>f2</fraction_done_filename>"),
        ("g", "true", "<weight>1</weight>"),
        ("", "true", "<weight>1</weight>"),
    )

    def wish() -> Status:
        if client.fractions and client.fractions[-1] == pytest.approx((1 + 1 + 1) / 8):
            (slot / "go").touch()
        return Status()

    client.wish = wish
    assert run(slot) == 0
    assert (slot / "go").exists()


def test_one_that_fails_ends_the_others_and_the_job(slot: Path, client: Client) -> None:
    write_job(
        slot,
        ("g", "until [ -e go ]; do sleep 0.02; done; echo sorry >&2; exit 3", "<stderr_filename>e</stderr_filename>"),
        ("g", "echo $$ > pid; touch go; exec sleep 99", ""),
    )
    started = time.monotonic()
    assert run(slot) == 195
    assert time.monotonic() - started < 60
    assert "task 1 (./t1.sh) ended with exit status 3; the end of e:\n    sorry" in log(slot)
    gone((slot / "pid").read_text())


def gone(pid: str) -> None:
    """A process that was killed takes a moment to disappear."""
    until = time.monotonic() + 30
    while Path(f"/proc/{pid.strip()}").exists():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_task_that_is_done_is_not_run_again(slot: Path, client: Client) -> None:
    write_job(
        slot,
        ("", "true", ""),
        ("g", "echo 1 >> runs", ""),
        ("g", "echo 2 >> runs; [ -e again ] || exec sleep 99", ""),
    )

    def wish() -> Status:
        done = StateFile(slot).state.group_done == (2,) and (slot / "runs").read_text().count("\n") == 2
        return Status(leave=Leave.QUIT if done else Leave.STAY)

    client.wish = wish
    assert run(slot) == 0
    assert (slot / "wrapper_checkpoint.txt").read_text().startswith("1 ")
    (slot / "again").touch()
    client.wish = Status
    assert run(slot) == 0
    assert sorted((slot / "runs").read_text().split()) == ["1", "2", "2"]
    assert "1 of the 2 tasks of this group are done already" in log(slot)
    assert (slot / "wrapper_checkpoint.txt").read_text().startswith("3 ")
    assert client.fractions[-1] == 1.0


def test_suspend_and_resume_hold_all_of_a_group(slot: Path, client: Client) -> None:
    count = "i=0; while [ $i -lt 40 ]; do i=$((i+1)); echo $i > n{}; sleep 0.02; done"
    write_job(slot, ("g", count.format(1), ""), ("g", count.format(2), ""))
    seen: list[tuple[str, str]] = []

    def wish() -> Status:
        if not (slot / "n1").exists() or not (slot / "n2").exists() or len(seen) > 12:
            return Status()
        seen.append(((slot / "n1").read_text(), (slot / "n2").read_text()))
        return Status(suspended=True)

    client.wish = wish
    assert run(slot) == 0
    assert len(set(seen[2:])) == 1, seen
    assert (slot / "n1").read_text() == (slot / "n2").read_text() == "40\n"


def test_abort_ends_all_of_a_group(slot: Path, client: Client) -> None:
    hold = "echo $$ > pid{}; exec sleep 99"
    write_job(slot, ("g", hold.format(1), ""), ("g", hold.format(2), ""))
    pids = [slot / "pid1", slot / "pid2"]

    def wish() -> Status:
        return Status(leave=Leave.ABORT if all(pid.exists() and pid.read_text() for pid in pids) else Leave.STAY)

    client.wish = wish
    assert run(slot) == 0
    for pid in pids:
        gone(pid.read_text())
    assert not (slot / "boinc_finish_called").exists()


def test_a_time_limit_is_one_tasks_own(slot: Path, client: Client) -> None:
    write_job(slot, ("g", "exec sleep 99", "<time_limit>0.3</time_limit>"), ("g", "sleep 0.6; echo out > out", ""))
    assert run(slot) == 0
    assert (slot / "out").read_text() == "out\n"
    assert "task 1 (./t1.sh) reached its time limit" in log(slot)


def test_the_time_of_a_limited_task_is_noted_now_and_then(
    slot: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a wrapper that is killed does not give it all of its time anew; the other task of the group has none."""
    monkeypatch.setattr(step, "NOTE_TIME_S", 0.0)
    wait = "until [ -e go ]; do sleep 0.02; done"
    write_job(slot, ("g", wait, "<time_limit>1000</time_limit>"), ("g", wait, ""))

    def wish() -> Status:
        if list(StateFile(slot).state.ran_s) == ["1"]:
            (slot / "go").touch()
        return Status()

    client.wish = wish
    assert run(slot) == 0
    assert StateFile(slot).state.ran_s == {}


def test_a_group_in_one_vm_in_another_and_on_the_host(slot: Path, client: Client) -> None:
    """All three at once: each waits until the two others are there."""
    place = slot.parent
    script = f"touch {place}/$ME; until [ -e {place}/a -a -e {place}/b -a -e {place}/c ]; do sleep 0.02; done; "
    out = "<copy_file_from_VM>out-{0}</copy_file_from_VM><stdout_filename>o-{0}</stdout_filename>"
    write_job(
        slot,
        ("g", script.replace("$ME", "a") + "echo a; echo a > out-a", in_vm("CernVM", out.format("a"))),
        ("g", script.replace("$ME", "b") + "echo b; echo b > out-b", in_vm("CernVM", out.format("b"))),
        ("g", script.replace("$ME", "c") + "echo c; echo c > out-c", in_vm("Other", out.format("c"))),
        ("g", script.replace("$ME", "d"), ""),
    )
    assert run(slot) == 0
    assert [(slot / f"out-{name}").read_text() for name in "abc"] == ["a\n", "b\n", "c\n"]
    assert [(slot / f"o-{name}").read_text() for name in "abc"] == ["a\n", "b\n", "c\n"]
    started = [args["vm"] for call, args in calls(slot) if call == "start_vm"]
    assert set(started) == {"CernVM", "Other"}
    stopped = [args["vm"] for call, args in calls(slot) if call == "stop_vm"]
    assert sorted(stopped) == ["CernVM", "Other"]
    assert StateFile(slot).state.commands == ()
    assert len(client.pids - {0}) == 1


def test_another_task_was_quicker_to_start_the_vm(slot: Path, client: Client) -> None:
    write_job(slot, ("", "echo done > out", in_vm("CernVM", "<copy_file_from_VM>out</copy_file_from_VM>")))
    assert run(slot, "exists-once=start_vm") == 0
    assert (slot / "out").read_text() == "done\n"


def test_quit_saves_each_vm_of_a_group(slot: Path, client: Client) -> None:
    write_job(
        slot,
        ("g", "exec sleep 99", in_vm("CernVM")),
        ("g", "exec sleep 99", in_vm("CernVM")),
        ("g", "exec sleep 99", in_vm("Other")),
    )
    client.wish = lambda: Status(leave=Leave.QUIT if log(slot).count(": running\n") == 3 else Leave.STAY)
    assert run(slot) == 0
    assert sorted(args["vm"] for call, args in calls(slot) if call == "save_vm") == ["CernVM", "CernVM", "Other"]
    assert log(slot).count("is saved, and goes on at the next start") == 3
    records = StateFile(slot).state.commands
    assert sorted((record.task, record.vm, record.asked) for record in records) == [
        (1, "CernVM", True),
        (2, "CernVM", True),
        (3, "Other", True),
    ]


def parse(tasks: str) -> Any:
    return parse_job(f"<job_desc>\n{tasks}</job_desc>".encode(), Path("job.xml"))


def task(group: str, more: str = "") -> str:
    return f"<task><application>a</application><parallel_group>{group}</parallel_group>{more}</task>\n"


def test_steps() -> None:
    job = parse(task("") + task("g") + task("g") + task("h") + task("") + task(""))
    assert [[each.number for each in step] for step in job.steps()] == [[1], [2, 3], [4], [5], [6]]
    assert [[each.number for each in step] for step in job.steps(3)] == [[4], [5], [6]]


@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [
        (
            task("g") + task("") + task("g"),
            "job.xml:4: the parallel group 'g' began on line 2 and had ended before task 2",
        ),
        (
            task("g", "<stdout_filename>o</stdout_filename>") + task("g", "<stderr_filename>o</stderr_filename>"),
            "job.xml:3: <stderr_filename> 'o' is also that of task 1, which runs at the same time",
        ),
        (
            task("g", in_vm("A", "<copy_file_from_VM>r</copy_file_from_VM>"))
            + task("g", in_vm("B", "<copy_file_from_VM>r</copy_file_from_VM>")),
            "<copy_file_from_VM> 'r' is also that of task 1",
        ),
        (
            task("g", in_vm("A", "<fraction_done_filename>f</fraction_done_filename>")) * 2,
            "<fraction_done_filename> 'f' is also that of task 1",
        ),
    ],
)
def test_mistakes(tasks: str, sentence: str) -> None:
    with pytest.raises(JobError) as error:
        parse(tasks)
    assert sentence in str(error.value)


def test_what_may_have_the_same_name_in_two_vms() -> None:
    name = "<fraction_done_filename>f</fraction_done_filename>"
    assert not parse(task("g", in_vm("A", name)) + task("g", in_vm("B", name)) + task("g", name)).warnings


def test_a_group_without_effect() -> None:
    job = parse(task("g", "<daemon/>") + task(""))
    assert "<parallel_group> has no effect in a <daemon>" in job.warnings[0]


def test_a_state_file_of_before_there_were_groups(tmp_path: Path) -> None:
    import zlib

    record = {"task": 2, "vm": "V", "instance": "i", "command": "c-1", "asked": True, "agent": "", "output_starts": {}}
    for command, expected in ((record, 1), (None, 0)):
        line = json.dumps({"command": command, "temporary_exits": 3, "end_early": False})
        (tmp_path / "vmwrapper_state.json").write_text(f"{line}\n{zlib.crc32(line.encode()):08x}\n")
        state = StateFile(tmp_path).state
        assert len(state.commands) == expected
        assert state.temporary_exits == 3
    assert state.group_done == ()
