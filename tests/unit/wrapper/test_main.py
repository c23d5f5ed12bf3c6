"""The real `vmwrapper` command in a slot, host tasks only: success, failure, restart, quit, options, and its weight."""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from host_agent.vmctl.check import add_parser
from host_agent.wrapper.events import Events
from host_agent.wrapper.exit_codes import SENTENCES, Exit
from host_agent.wrapper.options import HELP, Options, UsageError, parse_options
from host_agent.wrapper.state import StateFile

COMMAND = [sys.executable, "-P", "-m", "host_agent.wrapper.main"]
ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def slot(tmp_path: Path) -> Path:
    return tmp_path


def task(script: str, more: str = "") -> str:
    return f'<task><application>sh</application><command_line>-c "{escape(script)}"</command_line>{more}</task>\n'


def write_job(slot: Path, *parts: str) -> None:
    (slot / "job.xml").write_text(f"<job_desc>\n{''.join(parts)}</job_desc>\n")


def run(slot: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words], cwd=slot, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )


def start(slot: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(COMMAND, cwd=slot, env=ENVIRONMENT, stderr=subprocess.DEVNULL, start_new_session=True)


def log(slot: Path) -> str:
    return (slot / "stderr.txt").read_text()


def checkpoint(slot: Path) -> int:
    return int((slot / "wrapper_checkpoint.txt").read_text().split()[0])


def test_tasks_run_in_order(slot: Path) -> None:
    unzip = "<unzip_task><application>sh</application><command_line>-c 'echo u >> o'</command_line></unzip_task>"
    write_job(slot, task("echo 1 >> o"), unzip, task("echo 2 >> o; echo to stderr.txt", "<weight>3</weight>"))
    done = run(slot)
    assert done.returncode == 0
    assert (slot / "o").read_text() == "u\n1\n2\n"
    assert (slot / "boinc_finish_called").read_text() == "0\n"
    assert checkpoint(slot) == 2
    assert "to stderr.txt\n" in log(slot)
    assert " 25.0% done" in done.stderr
    assert "100.0% done" in done.stderr
    assert not (slot / "wrapper_processes.txt").exists()


def test_a_failing_task(slot: Path) -> None:
    write_job(slot, task("echo why >&2; exit 3", "<stderr_filename>e</stderr_filename>"), task("touch never"))
    assert run(slot).returncode == Exit.CHILD_FAILED
    assert "task 1 (sh) ended with exit status 3; the end of e:\n    why\n" in log(slot)
    assert (slot / "boinc_finish_called").read_text().startswith("195\n")
    assert not (slot / "never").exists()


@pytest.mark.parametrize("job", ["<job_desc/>", "not xml", "<job_desc><task><application/></task></job_desc>"])
def test_a_wrong_job_starts_nothing(slot: Path, job: str) -> None:
    (slot / "job.xml").write_text(job)
    assert run(slot).returncode == Exit.INIT_FAILURE
    assert log(slot).splitlines()[0].partition("): ")[2].startswith("job.xml:1: ")
    assert not (slot / "wrapper_checkpoint.txt").exists()


def test_a_missing_program_starts_nothing(slot: Path) -> None:
    daemon = "<task><application>sh</application><command_line>-c 'touch d'</command_line><daemon/></task>\n"
    write_job(slot, daemon, "<task><application>./none</application></task>")
    assert run(slot).returncode == Exit.INIT_FAILURE
    assert "job.xml:3: task 1 (./none): there is no program './none' in the slot" in log(slot)
    assert not (slot / "d").exists()


@pytest.mark.parametrize("leader_too", [False, True])
def test_restart_after_kill_does_not_run_a_finished_task_again(slot: Path, leader_too: bool) -> None:
    os.mkfifo(slot / "ready")
    unzip = "<unzip_task><application>sh</application><command_line>-c 'echo u >> o'</command_line></unzip_task>"
    noted = "until [ -e wrapper_processes.txt ]; do :; done"
    second = f"echo 2 >> o; [ -e again ] || {{ {noted}; echo $$ > ready; exec sleep 99; }}"
    write_job(slot, unzip, task("echo 1 >> o"), task(second))
    wrapper = start(slot)
    left = int((slot / "ready").read_text())
    descriptor = os.pidfd_open(left)
    leader = int((slot / "wrapper_processes.txt").read_text().split()[0])
    if leader_too:  # as when everything of the client's is killed at once, one after another
        wrapper.send_signal(signal.SIGSTOP)
        os.kill(leader, signal.SIGKILL)
    wrapper.kill()
    wrapper.wait()
    assert checkpoint(slot) == 1
    if not leader_too:  # the leader ends its task by itself
        assert select.select([descriptor], [], [], 30)[0]
    (slot / "again").touch()
    assert run(slot).returncode == 0
    assert (slot / "o").read_text() == "u\n1\n2\n2\n"
    assert ("ended 1 task(s) that an earlier vmwrapper had left running" in log(slot)) == leader_too
    assert "going on after 1 of 2 tasks" in log(slot)
    assert select.select([descriptor], [], [], 10)[0]
    os.close(descriptor)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_quit_by_a_signal(slot: Path, number: signal.Signals) -> None:
    os.mkfifo(slot / "ready")
    write_job(slot, task("echo $$ > ready; exec sleep 99"))
    wrapper = start(slot)
    child = int((slot / "ready").read_text())
    wrapper.send_signal(number)
    assert wrapper.wait(60) == 0
    assert not (slot / "boinc_finish_called").exists()
    assert f"ending because of {number.name}" in log(slot)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_time_limit_goes_on_with_the_next_task(slot: Path) -> None:
    write_job(slot, task("exec sleep 99", "<time_limit>0.2</time_limit>"), task("touch second"))
    assert run(slot).returncode == 0
    assert (slot / "second").exists()
    assert "task 1 (sh) reached its time limit and was ended" in log(slot)


def test_a_time_limit_counts_over_restarts(slot: Path) -> None:
    os.mkfifo(slot / "ready")
    limited = "[ -e again ] || echo $$ > ready; exec sleep 99"
    write_job(slot, task(limited, "<time_limit>1000</time_limit>"), task("touch second"))
    wrapper = start(slot)
    (slot / "ready").read_text()
    wrapper.terminate()
    assert wrapper.wait(60) == 0
    state = StateFile(slot)
    assert 0 < state.state.ran_s["1"] < 1000
    state.change(ran_s={"1": 999.9})
    (slot / "again").touch()
    assert run(slot).returncode == 0
    assert (slot / "second").exists()
    assert "task 1 (sh) reached its time limit and was ended; CPU 0." in log(slot)
    assert re.search(r", run time 1\d\d\d\.", log(slot))
    assert StateFile(slot).state.ran_s == {}


def test_daemons_run_beside_and_are_ended(slot: Path) -> None:
    os.mkfifo(slot / "hello")
    write_job(slot, task("cat hello > pid"), task("echo $$ > hello; exec sleep 99", "<daemon/>"))
    assert run(slot).returncode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((slot / "pid").read_text()), 0)


def test_zip_input_and_output(slot: Path) -> None:
    with zipfile.ZipFile(slot / "in.zip", "w") as archive:
        archive.writestr("a.txt", "input")
    write_job(
        slot,
        "<unzip_input><zipfilename>in.zip</zipfilename></unzip_input>",
        "<zip_output><zipfilename>out.zip</zipfilename><filename>.*txt$</filename></zip_output>",
        task("cat a.txt > b.txt; echo x > c.dat"),
    )
    assert run(slot).returncode == 0
    assert not (slot / "in.zip").exists()
    with zipfile.ZipFile(slot / "out.zip") as archive:
        assert [name for name in archive.namelist() if name != "stderr.txt"] == ["b.txt"]


def test_arguments_and_checkpoint_file(slot: Path) -> None:
    script = "printf '%s ' $0 $@ > o"
    (slot / "s.sh").write_text(f"#!/bin/sh\n{script}\n")
    (slot / "s.sh").chmod(0o755)
    tags = "<application>./s.sh</application><command_line>$NTHREADS 'a b'</command_line><append_cmdline_args/>"
    write_job(slot, f"<task>{tags}</task>")
    assert run(slot, "--nthreads", "3", "--device", "1", "--passthrough_child", "--x", "$NTHREADS y").returncode == 0
    assert (slot / "o").read_text().split()[1:] == ["3", "a", "b", "--x", "3", "y"]


def test_options() -> None:
    words = ["--nthreads=2", "--trickle", "1.5", "--use_tstp", "--sporadic", "--passthrough_child", "--nthreads", "x"]
    assert parse_options(words) == Options(
        nthreads=2, trickle_s=1.5, use_tstp=True, sporadic=True, child_words=("--nthreads", "x")
    )
    for words in (["--nthreads"], ["--nthreads", "x"], ["--no-such"], ["job.xml"]):
        with pytest.raises(UsageError):
            parse_options(words)
    assert set(SENTENCES) == set(Exit)


def test_a_wrong_option(slot: Path) -> None:
    done = run(slot, "--no-such")
    assert done.returncode == Exit.INIT_FAILURE
    assert "vmwrapper has no option '--no-such'" in done.stderr
    assert (slot / "boinc_finish_called").read_text().startswith("206\n")


def test_help_and_version(slot: Path) -> None:
    assert run(slot, "--help").stdout == HELP
    assert run(slot, "--version").stdout.startswith("vmwrapper ")


def test_a_host_job_imports_neither_twisted_nor_a_hypervisor(slot: Path) -> None:
    write_job(slot, task("true"))
    code = (
        "import sys, json; from host_agent.wrapper.main import main; status = main([]); "
        "print(json.dumps([status, sorted(sys.modules)]))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=slot, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    status, modules = json.loads(done.stdout)
    assert status == 0
    heavy = {"twisted", "zope", "stomp", "asyncio", "psutil", "virtualbox", "argparse", "logging", "ssl", "zipfile"}
    heavy |= {"lxml", "hashlib", "random", "ctypes"}
    assert not heavy & {name.partition(".")[0] for name in modules}
    assert not [name for name in modules if name.startswith("host_agent.hypervisors")]
    assert not {"host_agent.control_client", "host_agent.wrapper.guest_task"} & set(modules)


def run_check(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["check", *words])
    status = args.func(args)
    out, err = capsys.readouterr()
    return status, out, err


def test_vmctl_check(slot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run_check(capsys, str(ROOT / "examples/worker/job.xml"), "--strict")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[:3] for line in lines[1:5]] == [
        ["first", "host", "tar"],
        ["beside", "host", "the"],
        ["task", "1", "CernVM"],
        ["task", "2", "host"],
    ]
    assert "67%" in lines[3]
    write_job(slot, task("true", "<colour/>"), "<task><application>./later</application></task>")
    status, out, err = run_check(capsys, str(slot / "job.xml"))
    assert status == 0
    assert "warning: job.xml:2: <colour> is not a tag of <task>" in err
    assert "an earlier task must make it" in err
    status, _, err = run_check(capsys, str(slot / "job.xml"), "--strict")
    assert (status, err.count("\n")) == (1, 1)
    write_job(slot, "<task><application>./none</application></task>")
    status, _, err = run_check(capsys, str(slot / "job.xml"))
    assert status == 1
    assert "there is no program './none'" in err


@pytest.fixture(autouse=True)
def _no_signal_handlers_of_ours() -> Iterator[None]:
    """A test that fails must not leave our process with the wrapper's handlers."""
    yield
    assert getattr(signal.getsignal(signal.SIGTERM), "__module__", "") != Events.__module__
