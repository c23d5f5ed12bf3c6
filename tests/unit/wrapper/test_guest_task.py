"""Tasks in a VM, with a host agent that is scripted: order of the calls, results, and every way to fail."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from host_agent.wrapper import agent_process, step
from host_agent.wrapper.boinc.runtime import InitData, Leave, Preferences, Status
from host_agent.wrapper.boinc.slot_files import FINISH_FILE
from host_agent.wrapper.boinc.standalone import StandaloneRuntime
from host_agent.wrapper.main import build_wrapper
from host_agent.wrapper.options import Options
from host_agent.wrapper.vm_wishes import VmWishes
from host_agent.wrapper.wrapper import Wrapper

FAKE = Path(__file__).with_name("fake_agent.py")

WORKER = """#!/bin/sh
echo 0.5 > fraction_done
tr a-z A-Z < in > out
tr a-z A-Z
echo "worker says $1 $COLOUR" >&2
exit ${2:-0}
"""

JOB = """<job_desc><task>
<virtualmachine>CernVM</virtualmachine><image>tiny</image><memory_mb>128</memory_mb>
<application>./worker.sh</application><copy_app_to_VM>1</copy_app_to_VM>
<copy_file_to_VM>in</copy_file_to_VM><copy_stdin_to_VM>1</copy_stdin_to_VM>
<stdin_filename>words</stdin_filename><stdout_filename>o</stdout_filename><stderr_filename>e</stderr_filename>
<copy_file_from_VM>out</copy_file_from_VM><setenv>COLOUR=red</setenv>
<command_line>5</command_line>
</task></job_desc>"""

Run = Callable[..., int]


@pytest.fixture(autouse=True)
def _quick_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_process, "FIRST_RESTART_S", 0.05)


@pytest.fixture
def slot(tmp_path: Path) -> Path:
    slot = tmp_path / "slot"
    slot.mkdir()
    (slot / "worker.sh").write_text(WORKER)
    (slot / "worker.sh").chmod(0o755)
    (slot / "in").write_text("input\n")
    (slot / "words").write_text("words\n")
    (slot / "job.xml").write_text(JOB)
    return slot


def build(slot: Path, *plan: str) -> Wrapper:
    guest = slot.parent / "guest"
    return build_wrapper(Options(), slot, [sys.executable, str(FAKE), str(guest), *plan])


def run(slot: Path, *plan: str) -> int:
    wrapper = build(slot, *plan)
    try:
        return int(wrapper.run())
    finally:
        wrapper.events.close()
        wrapper.log.close()


def calls(slot: Path) -> list[tuple[str, dict[str, Any]]]:
    lines = (slot.parent / "calls").read_text().splitlines()
    return [(call, json.loads(args)) for call, _, args in (line.partition(" ") for line in lines)]


def log(slot: Path) -> str:
    return (slot / "stderr.txt").read_text()


def test_a_task_in_a_vm(slot: Path) -> None:
    assert run(slot) == 0
    assert (slot / "out").read_text() == "INPUT\n"
    assert (slot / "o").read_text() == "WORDS\n"
    assert (slot / "e").read_text() == "worker says 5 red\n"
    made = calls(slot)
    names = [call for call, _ in made]
    assert names == ["hello", "vms", "start_vm", "put", "put", "put", "run", "get", "stop_vm", "shutdown"]
    start = made[2][1]
    assert start == {**start, "vm": "CernVM", "image": "tiny", "memory_mb": 128, "directory": str(slot)}
    assert [args["destination"] for call, args in made if call == "put"] == ["worker.sh", "in", "words"]
    command = made[6][1]
    assert command["argv"] == ["./worker.sh", "5"]
    assert command["stdin"] == "words"
    assert command["fraction_file"] == "fraction_done"
    assert command["stdout"] == str(slot / "o")
    assert (slot / "wrapper_checkpoint.txt").read_text().startswith("1 2.000000 ")
    assert not (slot.parent / "guest").exists()


def test_what_a_vm_has_used_is_in_the_log(slot: Path) -> None:
    assert run(slot) == 0
    assert "virtual machine CernVM: CPU 3.0 s on this computer in 20.0 s, 5.0 s of them paused" in log(slot)


def test_why_a_program_was_ended_is_in_the_log(slot: Path) -> None:
    (slot / "worker.sh").write_text("#!/bin/sh\nkill -9 $PPID $$\n")  # and whoever would note its end
    assert run(slot, "out of memory=run") == 195
    assert "task 1 (./worker.sh in CernVM): out of memory\n" in log(slot)
    assert "was ended by SIGKILL" in log(slot)


def test_a_failing_program(slot: Path) -> None:
    (slot / "job.xml").write_text(JOB.replace(">5<", ">5 7<"))
    assert run(slot) == 195
    assert "task 1 (./worker.sh in CernVM) ended with exit status 7; the end of e:" in log(slot)
    assert "    worker says 5 red" in log(slot)
    assert not (slot / "out").exists()
    assert calls(slot)[-1][0] == "shutdown"


def test_a_program_that_is_not_there(slot: Path) -> None:
    (slot / "job.xml").write_text(JOB.replace("<copy_app_to_VM>1</copy_app_to_VM>", ""))
    assert run(slot) == 195
    assert "could not be run: [Errno 2]" in log(slot)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ("start_vm", "the virtual machine could not be started: No start_vm today.\n  try later"),
        ("put", "a file could not be copied into the virtual machine ('./worker.sh'): No put today."),
        ("run", "the program could not be run in the virtual machine: No run today."),
        ("get", "a file could not be copied out of the virtual machine ('out'): No get today."),
    ],
)
def test_refused_calls(slot: Path, call: str, sentence: str) -> None:
    assert run(slot, f"refuse={call}") == 208
    assert sentence in log(slot)
    assert (slot / FINISH_FILE).read_text().startswith("208\n")
    assert calls(slot)[-1][0] == "shutdown"


@pytest.mark.parametrize("call", ["start_vm", "put", "run", "get"])
def test_the_agent_dies(slot: Path, call: str) -> None:
    start = time.monotonic()
    assert run(slot, f"die={call}") == 208
    assert log(slot).count("the host agent ended (exit status 9); the end of host-agent.log:") == 4
    assert "starting it anew in 0.05 s (1 of at most 3)" in log(slot)
    assert f"    the fake agent dies at {call}" in log(slot)
    assert time.monotonic() - start < 40


@pytest.mark.parametrize("call", ["vms", "start_vm", "put", "run", "get"])
@pytest.mark.parametrize("keep", [["keep=1"], []], ids=["its VM goes on", "its VM is gone too"])
def test_the_agent_dies_once(slot: Path, call: str, keep: list[str]) -> None:
    (slot / "worker.sh").write_text(WORKER.replace("exit", f"echo again >> {slot.parent}/runs; sleep 0.3; exit"))
    assert run(slot, f"die-once={call}", *keep) == 0
    assert (slot / "out").read_text() == "INPUT\n"
    assert (slot / "o").read_text() == "WORDS\n"
    assert (slot / "e").read_text() == "worker says 5 red\n"
    assert (slot / "wrapper_checkpoint.txt").read_text().startswith("1 2.000000 ")
    again = call == "get" and not keep  # its results are gone with the VM
    assert (slot.parent / "runs").read_text() == "again\n" * (2 if again else 1)
    ids = {args["command"] for name, args in calls(slot) if name == "run"}
    assert (len(ids) == 2) == (not keep and call in ("run", "get"))


def test_the_clients_limits_reach_the_vm(slot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its start, and when the volunteer changes them."""
    more = f"until [ -e {slot.parent}/go ]; do sleep 0.05; done; exit"
    (slot / "worker.sh").write_text(WORKER.replace("exit", more))
    wrapper = build(slot)
    given = InitData(plan_class="vbox64", disk_bound=2e9, preferences=Preferences(cpu_usage_percent=60))
    wrapper.loop.wishes.follow(given)

    def limits() -> list[dict[str, Any]]:
        found = (slot.parent / "calls").exists()
        return [args for call, args in calls(slot) if call == "limit_vm"] if found else []

    def wish() -> Status:
        if len(limits()) == 2:
            (slot.parent / "go").touch()
        return Status(reread=len(limits()) == 1)

    client = Client(slot, wish)
    changed = given._replace(preferences=Preferences(cpu_usage_percent=30))
    monkeypatch.setattr(client, "init_data", lambda: changed)
    assert with_client(wrapper, client, monkeypatch) == 0
    assert [each["cpu_percent"] for each in limits()] == [60, 30]
    assert limits()[0]["disk_mb"] == 1716


def test_the_clients_network_is_the_vms(slot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed while the client's network is suspended, open when it is not: in a running VM, for a job that wants it."""
    more = f"until [ -e {slot.parent}/go ]; do sleep 0.05; done; exit"
    (slot / "worker.sh").write_text(WORKER.replace("exit", more))
    (slot / "job.xml").write_text(JOB.replace("<application>", "<network>1</network><application>"))
    wrapper = build(slot)

    def told() -> list[bool]:
        found = (slot.parent / "calls").exists()
        return [args["network"] for call, args in calls(slot) if call == "limit_vm"] if found else []

    def wish() -> Status:
        if len(told()) == 3:
            (slot.parent / "go").touch()
        return Status(network_suspended=len(told()) == 1)

    assert with_client(wrapper, Client(slot, wish), monkeypatch) == 0
    assert told() == [True, False, True]
    assert next(args for call, args in calls(slot) if call == "start_vm")["network"] is True


@pytest.mark.parametrize(
    ("given", "percent"),
    [
        (InitData(preferences=Preferences(cpu_usage_percent=60)), 0),  # the client suspends us now and then
        (InitData(plan_class="x_vbox64", preferences=Preferences(cpu_usage_percent=60)), 60),
        (InitData(ncpus=0.5, preferences=Preferences(cpu_usage_percent=60)), 60),
        (InitData(gpu_type="NVIDIA", preferences=Preferences(cpu_usage_percent=60)), 60),
        (InitData(plan_class="vbox64", preferences=Preferences(cpu_usage_percent=100)), 0),
        (InitData(plan_class="vbox64"), 0),
    ],
)
def test_who_holds_a_vm_to_its_share(given: InitData, percent: float) -> None:
    wishes = VmWishes()
    wishes.follow(given)
    assert wishes.limits.cpu_percent == percent


def test_how_fast_a_vm_may_use_the_network() -> None:
    wishes = VmWishes()
    wishes.follow(InitData(preferences=Preferences(max_bytes_up_s=1000, max_bytes_down_s=2000)))
    assert (wishes.limits.up_bytes_s, wishes.limits.down_bytes_s) == (1000, 2000)


@pytest.mark.parametrize("plan", ["lose-once=run", "lose-vm-once=put", "lose-vm-once=get"])
def test_a_vm_that_is_lost_is_made_anew_once(slot: Path, plan: str) -> None:
    (slot / "vm_failed_CernVM.console.log").write_text("Kernel panic\n")
    assert run(slot, plan) == 0
    assert (slot / "out").read_text() == "INPUT\n"
    assert (slot / "o").read_text() == "WORDS\n"
    assert (slot / "e").read_text() == "worker says 5 red\n"
    assert "beginning it anew in a new virtual machine, this once" in log(slot)
    assert "the end of the console of the virtual machine CernVM:\nKernel panic\n" in log(slot)
    names = [call for call, _ in calls(slot)]
    assert names.count("start_vm") == 2
    ids = [args["command"] for name, args in calls(slot) if name == "run"]
    assert len(set(ids)) == len(ids)


def test_a_vm_that_is_lost_again_is_given_up(slot: Path) -> None:
    assert run(slot, "lose-vm-once=put", "refuse=run") == 208
    names = [call for call, _ in calls(slot)]
    assert names.count("start_vm") == 2
    assert log(slot).count("beginning it anew") == 1


def test_a_saved_vm_that_cannot_go_on_is_made_anew(slot: Path) -> None:
    """Kept with KVM, say, which this computer has no more: no error of the job's, and nothing that waiting mends."""
    state = slot.parent / "agent-state"
    state.mkdir()
    (state / "vm-CernVM").write_text("saved")
    assert run(slot, "keep=1", "refuse=resume_vm") == 0
    assert (slot / "out").read_text() == "INPUT\n"
    assert "the virtual machine could not be resumed: No resume_vm today.\nbeginning it anew" in log(slot)
    steps = [(call, args.get("instance")) for call, args in calls(slot) if call.endswith("_vm")]
    assert steps[:3] == [("resume_vm", None), ("stop_vm", "saved"), ("start_vm", None)]


def start(slot: Path) -> subprocess.Popen[bytes]:
    """The wrapper in a process of its own, to be killed; its host agent's VM and command go on."""
    code = f"""
import sys
from pathlib import Path
from host_agent.wrapper.main import build_wrapper
from host_agent.wrapper.options import Options
agent = [sys.executable, {str(FAKE)!r}, {str(slot.parent / "guest")!r}, "keep=1"]
build_wrapper(Options(), Path({str(slot)!r}), agent).run()
"""
    return subprocess.Popen([sys.executable, "-c", code], cwd=FAKE.parents[3], stderr=subprocess.DEVNULL)


def test_a_killed_wrapper_goes_on_with_the_command_that_it_started(slot: Path) -> None:
    more = f"echo run >> {slot.parent}/runs; until [ -e {slot.parent}/go ]; do sleep 0.05; done; exit"
    (slot / "worker.sh").write_text(WORKER.replace("exit", more))
    with start(slot) as first:
        until = time.monotonic() + 60
        while not (slot.parent / "runs").exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        first.kill()
    assert (slot / "o").read_text() == "WORDS\n"
    (slot.parent / "go").touch()
    assert run(slot, "keep=1") == 0
    assert (slot.parent / "runs").read_text() == "run\n"
    assert (slot / "o").read_text() == "WORDS\n"
    assert (slot / "out").read_text() == "INPUT\n"
    assert "going on with command c-" in log(slot)
    assert [call for call, _ in calls(slot)].count("put") == 3


def test_killed_at_any_moment_the_program_runs_once(slot: Path) -> None:
    (slot / "worker.sh").write_text(WORKER.replace("exit", f"echo run >> {slot.parent}/runs; sleep 1; exit"))
    seed = int(os.environ.get("VMWRAPPER_CHAOS_SEED", random.randrange(10**6)))
    print("VMWRAPPER_CHAOS_SEED", seed)
    chance = random.Random(seed)
    for _ in range(8):
        with start(slot) as wrapper:
            with contextlib.suppress(subprocess.TimeoutExpired):
                wrapper.wait(chance.uniform(0.2, 1.5))
            wrapper.kill()
    if not (slot / FINISH_FILE).exists():
        assert run(slot, "keep=1") == 0
    assert (slot.parent / "runs").read_text() == "run\n"
    assert (slot / "o").read_text() == "WORDS\n"
    assert (slot / "e").read_text() == "worker says 5 red\n"
    assert (slot / "out").read_text() == "INPUT\n"
    assert (slot / "wrapper_checkpoint.txt").read_text().startswith("1 2.000000 ")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("", ""), {}),
        (("both", "both"), {"both": "before\nWORDS\nworker says 5 red\n"}),
        (("both", ""), {"both": "before\nWORDS\n"}),
    ],
    ids=["no files", "one file for both", "one file"],
)
def test_output_files(slot: Path, names: tuple[str, str], expected: dict[str, str]) -> None:
    (slot / "both").write_text("before\n")
    tags = f"<stdout_filename>{names[0]}</stdout_filename><stderr_filename>{names[1]}</stderr_filename>"
    job = JOB.replace("<stdout_filename>o</stdout_filename><stderr_filename>e</stderr_filename>", tags)
    (slot / "job.xml").write_text(job)
    assert run(slot) == 0
    for name, text in expected.items():
        assert (slot / name).read_text() == text
    assert ("in CernVM) wrote to its stdout:\nWORDS\n" in log(slot)) == (not names[0])
    assert ("in CernVM) wrote to its stderr:\nworker says 5 red\n" in log(slot)) == (not names[1])
    (command,) = [args for call, args in calls(slot) if call == "run"]
    assert len({command["stdout"], command["stderr"], str(slot / "stderr.txt")}) == 3
    assert not list(slot.glob("vm_task_*"))


def test_the_agent_does_not_start(slot: Path) -> None:
    assert run(slot, "early=1") == 208
    assert log(slot).count("the host agent ended (exit status 3)") == 4
    assert "the fake agent cannot start" in log(slot)
    assert "without the state directory host-agent, which may be why it does not come up" in log(slot)
    assert (slot / "host-agent.unusable").is_dir()


def test_a_missing_input_is_found_before_anything_starts(slot: Path) -> None:
    (slot / "in").unlink()
    assert run(slot) == 206
    assert "job.xml:1: task 1 (./worker.sh in CernVM): there is no 'in' in the slot" in log(slot)
    assert not (slot.parent / "calls").exists()


def test_time_limit_ends_the_program_and_keeps_its_results(slot: Path) -> None:
    (slot / "worker.sh").write_text("#!/bin/sh\necho half > out\nexec sleep 60\n")
    (slot / "job.xml").write_text(JOB.replace("<command_line>", "<time_limit>1</time_limit><command_line>"))
    assert run(slot) == 0
    assert (slot / "out").read_text() == "half\n"
    assert "reached its time limit" in log(slot)


class Client(StandaloneRuntime):
    """A runtime that says what it is told to."""

    def __init__(self, slot: Path, wish: Callable[[], Status]) -> None:
        super().__init__(slot)
        self.poll = wish  # type: ignore[method-assign]
        self.finished: list[int] = []

    def finish(self, status: int, message: str = "", is_notice: bool = False) -> int:
        self.finished.append(status)
        return status


def with_client(wrapper: Wrapper, client: Client, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(step, "TICK_S", 0.05)
    wrapper.runtime = wrapper.loop.runtime = wrapper.progress.runtime = client
    try:
        return int(wrapper.run())
    finally:
        wrapper.events.close()
        wrapper.log.close()


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ("refuse=start_vm", "the virtual machine could not be started: No start_vm today."),
        ("refuse=put", "a file could not be copied into the virtual machine"),
        ("die=run", "the host agent ended (exit status 9)"),
        ("early=1", "the host agent ended (exit status 3)"),
        ("refuse=get", ""),
    ],
)
def test_what_may_pass_is_a_temporary_exit(slot: Path, monkeypatch: pytest.MonkeyPatch, plan: str, reason: str) -> None:
    wrapper = build(slot, plan)
    wrapper.standalone = False
    client = Client(slot, Status)
    assert with_client(wrapper, client, monkeypatch) == (0 if reason else 208)
    temporary = slot / "boinc_temporary_exit"
    assert temporary.exists() == bool(reason)
    assert client.finished == ([] if reason else [208])  # an output that is not there does not come by waiting
    if reason:
        delay, text = temporary.read_text().splitlines()[:2]
        assert 12 <= int(delay) <= 18
        assert reason in text


def test_quit_ends_the_vm_without_a_finish_file(slot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (slot / "worker.sh").write_text("#!/bin/sh\nexec sleep 60\n")
    client = Client(slot, lambda: Status(leave=Leave.QUIT if "in CernVM): running" in log(slot) else Leave.STAY))
    assert with_client(build(slot), client, monkeypatch) == 0
    assert client.finished == []
    assert "ending because of the client's quit request" in log(slot)
    assert calls(slot)[-1][0] == "shutdown"
    assert not (slot / FINISH_FILE).exists()


def test_a_vm_that_comes_up_after_a_suspend_is_paused(slot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = slot.parent / "slow-start"
    slow.touch()

    def wish() -> Status:
        if "start_vm" not in names():
            return Status()
        slow.unlink(missing_ok=True)
        return Status(suspended="pause_vm" not in names())

    def names() -> list[str]:
        return [call for call, _ in calls(slot)] if (slot.parent / "calls").exists() else []

    assert with_client(build(slot), Client(slot, wish), monkeypatch) == 0
    assert names().index("pause_vm") < names().index("resume_vm") < names().index("put")


def test_suspend_holds_the_task_back_and_pauses_its_vm(slot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (slot / "worker.sh").write_text(
        WORKER.replace("exit", f"until grep -q resume {slot.parent}/calls; do sleep 0.05; done; exit")
    )
    wishes = [Status(suspended=True)] * 3

    def wish() -> Status:
        if wishes:
            return wishes.pop()
        if "in CernVM): running" in log(slot) and log(slot).count("suspended by") == 1:
            wishes.extend([Status(suspended=True)] * 2)
        return Status()

    client = Client(slot, wish)
    assert with_client(build(slot), client, monkeypatch) == 0
    names = [call for call, _ in calls(slot)]
    assert names.index("run") < names.index("pause_vm") < names.index("resume_vm")
    assert client.finished == [0]
    assert "suspended by the client" in log(slot)
    assert "resumed by the client" in log(slot)
