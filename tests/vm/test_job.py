"""The main job, end to end, in a real virtual machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from common.files import endpoints_dir
from host_agent.ledger import ledger_dir

ROOT = Path(__file__).resolve().parents[2]
VMCTL = str(Path(sys.executable).with_name("vmctl"))
DEADLINE = 240.0

pytestmark = pytest.mark.vm


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))
    monkeypatch.setenv("VMWRAPPER_GRACE", "2")
    monkeypatch.setenv("VMWRAPPER_IMAGES", os.environ.get("VMWRAPPER_IMAGES", str(ROOT / "build" / "images")))


def example(slot: Path) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "run_example.py"), "--slot", str(slot)]


def left_behind(slot: Path) -> list[str]:
    """Everything of a VM that could still be there."""
    processes = [
        str(each.info["cmdline"])
        for each in psutil.process_iter(["cmdline"])
        if str(slot) in " ".join(each.info["cmdline"] or []) and each.pid != os.getpid()
    ]
    files = [*slot.glob("vm-*"), *ledger_dir().iterdir(), *endpoints_dir().iterdir()]
    return processes + [str(path) for path in files]


def qemu_of(slot: Path, deadline: float = 60.0) -> psutil.Process:
    """The QEMU process of the job in `slot`, once its task is running."""
    until = time.monotonic() + deadline
    while time.monotonic() < until:
        if (slot / "stderr_worker").exists() and (slot / "stderr_worker").read_text():
            for each in psutil.process_iter(["cmdline"]):
                words = each.info["cmdline"] or []
                if words and words[0].endswith("qemu-system-x86_64") and str(slot) in " ".join(words):
                    return each
        time.sleep(0.05)
    raise AssertionError("no task was running in a VM")


def agent_of(qemu: psutil.Process) -> psutil.Process:
    """The host agent that has the VM of this process."""
    for entry in ledger_dir().glob("*/entry.json"):
        value = json.loads(entry.read_bytes())
        if value["process"] is not None and value["process"][0] == qemu.pid:
            return psutil.Process(value["owner"][0])
    raise AssertionError("no ledger entry names the VM")


def test_the_worker_example(tmp_path: Path) -> None:
    slot = tmp_path / "slot"
    done = subprocess.run(example(slot), capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    source = ROOT / "examples" / "worker"
    assert (slot / "out").read_bytes() == (source / "in").read_bytes().upper()
    assert (slot / "stdout_worker").read_bytes() == (source / "stdin_worker").read_bytes().upper()
    assert "worker: done" in (slot / "stderr_worker").read_text()
    assert "SHA-256" in (slot / "stdout_summary").read_text()
    assert (slot / "boinc_finish_called").read_text().split()[0] == "0"
    assert (slot / "wrapper_checkpoint.txt").read_text().split()[0] == "2"
    assert "finished with 0" in (slot / "stderr.txt").read_text()
    assert left_behind(slot) == []


def test_a_task_whose_vm_is_killed_begins_anew_once(tmp_path: Path) -> None:
    slot = tmp_path / "slot"
    with subprocess.Popen(example(slot), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        qemu = qemu_of(slot)
        qemu.kill()
        output, _ = job.communicate(timeout=DEADLINE)
    assert job.returncode == 0, output
    log = (slot / "stderr.txt").read_text()
    assert "killed by signal 9" in log
    assert "beginning it anew in a new virtual machine, this once" in log
    assert "the end of the console of the virtual machine" in log
    source = ROOT / "examples" / "worker"
    assert (slot / "out").read_bytes() == (source / "in").read_bytes().upper()
    assert (slot / "stdout_worker").read_bytes() == (source / "stdin_worker").read_bytes().upper()
    assert (slot / "stderr_worker").read_text().count("worker: done") == 1
    assert "Traceback" not in output
    assert len(list(slot.glob("vm_failed_*.console.log"))) == 1
    assert left_behind(slot) == []


def test_a_killed_host_agent_is_started_anew_and_the_task_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VMWRAPPER_GRACE")  # time for the next one to come
    slot = tmp_path / "slot"
    with subprocess.Popen(example(slot), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        qemu = qemu_of(slot)
        agent = agent_of(qemu)
        agent.kill()
        psutil.wait_procs([agent], timeout=10)
        assert qemu.is_running()
        output, _ = job.communicate(timeout=DEADLINE)
    assert job.returncode == 0, output
    log = (slot / "stderr.txt").read_text()
    assert "starting it anew" in log
    assert "going on with command c-" in log
    source = ROOT / "examples" / "worker"
    assert (slot / "out").read_bytes() == (source / "in").read_bytes().upper()
    assert (slot / "stdout_worker").read_bytes() == (source / "stdin_worker").read_bytes().upper()
    assert (slot / "stderr_worker").read_text().count("worker: done") == 1
    psutil.wait_procs([qemu], timeout=30)
    assert left_behind(slot) == []


def test_a_wrapper_that_is_killed_leaves_no_vm(tmp_path: Path) -> None:
    slot = tmp_path / "slot"
    with subprocess.Popen(example(slot), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        qemu = qemu_of(slot)
        agent = agent_of(qemu)
        wrapper = agent.parent()
        assert wrapper is not None
        wrapper.kill()
        _gone, alive = psutil.wait_procs([agent, qemu], timeout=30)
        assert not alive
        job.send_signal(signal.SIGKILL)
    until = time.monotonic() + 30
    while left_behind(slot):  # the leash is at it
        assert time.monotonic() < until, left_behind(slot)
        time.sleep(0.1)


COUNTING = """\
<job_desc>
  <task>
    <virtualmachine>box</virtualmachine>
    <application>./count.sh</application>
    <copy_app_to_VM>1</copy_app_to_VM>
    <stdout_filename>stdout</stdout_filename>
    <copy_file_from_VM>effects</copy_file_from_VM>
  </task>
</job_desc>
"""
COUNT = """\
#!/bin/sh
echo x >> effects
i=0
while [ $i -lt 60 ]; do i=$((i+1)); echo $i; sleep 0.25; done
"""


def test_a_wrapper_that_is_told_to_quit_saves_the_vm_and_the_next_one_goes_on(tmp_path: Path) -> None:
    """Twice: the program runs once, and its output is as if in one go."""
    slot = tmp_path / "slot"
    slot.mkdir()
    (slot / "job.xml").write_text(COUNTING)
    (slot / "count.sh").write_text(COUNT)
    (slot / "count.sh").chmod(0o755)
    command = [sys.executable, "-P", "-m", "host_agent.wrapper.main"]
    for lines in (3, 9):
        with subprocess.Popen(command, cwd=slot, stderr=subprocess.DEVNULL) as job:
            until = time.monotonic() + DEADLINE
            while not (slot / "stdout").exists() or (slot / "stdout").read_bytes().count(b"\n") < lines:
                assert time.monotonic() < until and job.poll() is None, (slot / "stderr.txt").read_text()
                time.sleep(0.05)
            job.terminate()
            assert job.wait(60) == 0
        assert not (slot / "boinc_finish_called").exists()
        assert not [each for each in left_behind(slot) if "qemu-system" in each]
    done = subprocess.run(command, cwd=slot, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr
    assert (slot / "stdout").read_text() == "".join(f"{number}\n" for number in range(1, 61))
    assert (slot / "effects").read_text() == "x\n"
    assert (slot / "stderr.txt").read_text().count("is saved, and goes on at the next start") == 2
    assert left_behind(slot) == []


MANAGED = """\
<job_desc>
  <VMmanage_task>
    <application>vmwrapper-host-agent</application>
    <stdout_filename>stdout_agent</stdout_filename>
    <stderr_filename>stderr_agent</stderr_filename>
  </VMmanage_task>
  <VMmanage_task>
    <application>sh</application>
    <command_line>-c "setsid sleep 1000"</command_line>
  </VMmanage_task>
  <task>
    <virtualmachine>box</virtualmachine>
    <application>sh</application>
    <command_line>-c "echo hello; sleep 1"</command_line>
    <stdout_filename>stdout</stdout_filename>
  </task>
</job_desc>
"""


def test_a_host_agent_that_the_job_itself_manages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens to the wrapper, what manages VMs ends with it; the next one begins with new ones."""
    slot = tmp_path / "slot"
    slot.mkdir()
    (slot / "job.xml").write_text(MANAGED)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    command = [sys.executable, "-P", "-m", "host_agent.wrapper.main"]
    with subprocess.Popen(command, cwd=slot, stderr=subprocess.DEVNULL) as wrapper:
        until = time.monotonic() + DEADLINE
        while not (slot / "stdout").exists() or not (slot / "stdout").read_bytes():
            assert time.monotonic() < until and wrapper.poll() is None, (slot / "stderr.txt").read_text()
            time.sleep(0.05)
        tree = psutil.Process(wrapper.pid).children(recursive=True)
        assert {"sleep", "vmwrapper-host-"} <= {each.name()[:15] for each in tree}
        wrapper.kill()
    _gone, alive = psutil.wait_procs(tree, timeout=30)
    assert alive == []
    done = subprocess.run(command, cwd=slot, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr
    assert (slot / "stdout").read_text() == "hello\n"
    assert left_behind(slot) == []


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[str]:
    """A VM named `box`, started as a person does."""
    command = [VMCTL, "start", "box"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None and running.stderr is not None
        assert "box is ready" in running.stdout.readline(), running.stderr.read()
        yield "box"
        running.send_signal(signal.SIGINT)
        assert running.wait(30) == 0
    assert not list(ledger_dir().iterdir())


def vmctl(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([VMCTL, *words], capture_output=True, text=True, timeout=DEADLINE, check=False)


def test_vmctl_runs_commands_and_copies_files(machine: str, tmp_path: Path) -> None:
    assert "running  present  debian-minimal" in vmctl("vms").stdout
    done = vmctl("run", "box", "--", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    assert vmctl("run", "box", "--", "id", "-un").stdout == "vmwrapper\n"
    group = vmctl("run", "box", "--", "cat", "/proc/self/cgroup").stdout
    assert "/vmwrapper/task-" in group  # its own account
    leaves = "cat /proc/self/cgroup; sleep 600 >/dev/null 2>&1 &"
    assert vmctl("run", "box", "--", "sh", "-c", leaves).stdout == group, "nothing ran in it any more"
    assert vmctl("run", "box", "--", "cat", "/proc/self/cgroup").stdout != group, "an orphan does"
    look = "cat /proc/sys/kernel/randomize_va_space; grep -qs 'QEMU TCG' /proc/cpuinfo && echo emulated; true"
    assert vmctl("run", "box", "--", "sh", "-c", look).stdout.split() in (["0", "emulated"], ["2"])
    told = vmctl("run", "box", "--", "cat", "/run/vmwrapper/config.json").stdout
    assert json.loads(told)["boots_again"] is False, "its disk ends with its memory: nothing waits for a flush"
    assert "favordynmods" in vmctl("run", "box", "--", "grep", "cgroup2", "/proc/mounts").stdout
    assert vmctl("run", "box", "--", "no-such-program").returncode == 127
    assert vmctl("run", "box", "--", "sh", "-c", "kill -9 $$").returncode == 137
    assert "No VM" in vmctl("ping", "cellar").stderr or "no VM" in vmctl("ping", "cellar").stderr

    source = tmp_path / "data"
    source.write_bytes(os.urandom(5_000_000))
    assert vmctl("copy", str(source), "box:there/").returncode == 0
    assert vmctl("copy", "box:there/data", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    assert "relative path" in vmctl("copy", "box:/etc/passwd", str(tmp_path / "x")).stderr

    assert vmctl("pause", "box").stdout == "box is paused\n"
    assert vmctl("resume", "box").stdout == "box is running\n"
    assert vmctl("ping", "box").returncode == 0


def test_doctor_finds_what_vms_need() -> None:
    done = vmctl("doctor")
    assert done.returncode == 0, done.stdout
    assert "qemu-system" in done.stdout
    assert "KVM" in done.stdout
