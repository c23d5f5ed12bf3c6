"""Parallel groups in real virtual machines, and two wrappers at once on one host."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from host_agent.ledger import ledger_dir
from host_agent.wrapper.boinc.testing import ClientSide

from .test_job import DEADLINE, left_behind
from .test_job import places as places  # the same directories

pytestmark = pytest.mark.vm

WRAPPER = [sys.executable, "-P", "-m", "host_agent.wrapper.main"]

GROUP = """\
<job_desc>
  <task>
    <virtualmachine>one</virtualmachine> <parallel_group>g</parallel_group> <weight>2</weight>
    <application>./meet.sh</application> <copy_app_to_VM>1</copy_app_to_VM> <command_line>a b</command_line>
    <stdout_filename>out-a</stdout_filename> <copy_file_from_VM>a</copy_file_from_VM>
  </task>
  <task>
    <virtualmachine>one</virtualmachine> <parallel_group>g</parallel_group>
    <application>./meet.sh</application> <copy_app_to_VM>1</copy_app_to_VM> <command_line>b a</command_line>
    <stdout_filename>out-b</stdout_filename> <copy_file_from_VM>b</copy_file_from_VM>
  </task>
  <task>
    <virtualmachine>two</virtualmachine> <parallel_group>g</parallel_group> <network>1</network>
    <application>./ask.py</application> <copy_app_to_VM>1</copy_app_to_VM>
    <stdout_filename>out-c</stdout_filename> <copy_file_from_VM>c</copy_file_from_VM>
  </task>
  <task>
    <parallel_group>g</parallel_group>
    <application>sh</application> <command_line>-c "echo host > d"</command_line>
  </task>
  <task>
    <application>cat</application> <command_line>a b c d</command_line> <stdout_filename>all</stdout_filename>
  </task>
</job_desc>
"""
MEET = """\
#!/bin/sh
echo $1 > $1
i=0
until [ -e $2 ]; do i=$((i+1)); [ $i -lt 600 ] || exit 1; sleep 0.1; done
echo met $2
"""
ASK = """\
#!/usr/bin/python3
import os, time, urllib.error, urllib.request
open("c", "w").write(os.uname().nodename + "\\n")
print(os.environ["http_proxy"], flush=True)
for _ in range(300):
    try:
        urllib.request.urlopen("http://192.0.2.7/", timeout=10)  # which is nobody's: the proxy says no
    except urllib.error.HTTPError as error:
        print(error.code, error.read().decode().strip())
        break
    except OSError:
        time.sleep(0.1)  # not open yet
"""
ALONE = """\
<job_desc><task>
  <virtualmachine>one</virtualmachine>
  <application>sh</application> <command_line>-c "ls; echo alone"</command_line>
  <stdout_filename>all</stdout_filename>
</task></job_desc>
"""


def start(slot: Path, job: str) -> subprocess.Popen[bytes]:
    slot.mkdir()
    (slot / "job.xml").write_text(job)
    for name, text in (("meet.sh", MEET), ("ask.py", ASK)):
        (slot / name).write_text(text)
        (slot / name).chmod(0o755)
    return subprocess.Popen(WRAPPER, cwd=slot, stderr=subprocess.DEVNULL)


def test_a_group_in_two_vms_and_on_the_host_beside_another_wrapper(tmp_path: Path) -> None:
    """Both wrappers have a VM of the same name, from the same image and template; each has its own."""
    slots = [tmp_path / "slot-1", tmp_path / "slot-2"]
    with start(slots[0], GROUP) as group, start(slots[1], ALONE) as alone:
        for job in (group, alone):
            job.wait(DEADLINE)
    logs = [(slot / "stderr.txt").read_text() for slot in slots]
    assert (group.returncode, alone.returncode) == (0, 0), "\n".join(logs)
    assert (slots[0] / "out-a").read_text() == "met b\n"
    assert (slots[0] / "out-b").read_text() == "met a\n"
    way_out = "http://10.0.2.100:61615\n403 192.0.2.7 is not a public address\n"
    assert (slots[0] / "out-c").read_text() == way_out
    everything = (slots[0] / "all").read_text().split()
    assert everything[:2] == ["a", "b"] and everything[-1] == "host" and len(everything) == 4
    assert (slots[1] / "all").read_text() == "alone\n"  # nothing of the other's VM
    assert (slots[0] / "wrapper_checkpoint.txt").read_text().startswith("5 ")
    assert left_behind(slots[0]) + left_behind(slots[1]) == []


COUNT = """\
#!/bin/sh
echo x >> effects-$1
i=0
while [ $i -lt 24 ]; do i=$((i+1)); echo $i; sleep 0.25; done
"""
COUNTERS = "".join(
    f"""<task> <virtualmachine>{vm}</virtualmachine> <parallel_group>g</parallel_group>
    <application>./count.sh</application> <copy_app_to_VM>1</copy_app_to_VM> <command_line>{name}</command_line>
    <stdout_filename>out-{name}</stdout_filename> <copy_file_from_VM>effects-{name}</copy_file_from_VM> </task>"""
    for vm, name in (("one", "a"), ("one", "b"), ("two", "c"))
)


def counters(slot: Path, script: str = COUNT) -> list[Path]:
    """Three tasks that count, in two VMs; returns where their output goes."""
    slot.mkdir()
    (slot / "job.xml").write_text(f"<job_desc>{COUNTERS}</job_desc>")
    (slot / "count.sh").write_text(script)
    (slot / "count.sh").chmod(0o755)
    return [slot / f"out-{name}" for name in "abc"]


def test_a_group_that_is_told_to_quit_goes_on_where_it_was(tmp_path: Path) -> None:
    slot = tmp_path / "slot"
    outputs = counters(slot)
    with subprocess.Popen(WRAPPER, cwd=slot, stderr=subprocess.DEVNULL) as job:
        until = time.monotonic() + DEADLINE
        while not all(each.exists() and each.read_bytes().count(b"\n") >= 3 for each in outputs):
            assert time.monotonic() < until and job.poll() is None, (slot / "stderr.txt").read_text()
            time.sleep(0.05)
        job.terminate()
        assert job.wait(60) == 0
    assert not [each for each in left_behind(slot) if "qemu-system" in each]
    done = subprocess.run(WRAPPER, cwd=slot, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr
    for name, output in zip("abc", outputs, strict=True):
        assert output.read_text() == "".join(f"{number}\n" for number in range(1, 25)), name
        assert (slot / f"effects-{name}").read_text() == "x\n"
    assert "is saved, and goes on at the next start" in (slot / "stderr.txt").read_text()
    assert left_behind(slot) == []


class Playing:
    """A client that beats while it waits."""

    def __init__(self, slot: Path, job: subprocess.Popen[bytes], client: ClientSide) -> None:
        self._slot, self._job, self._client = slot, job, client

    def until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE
        while not true():
            assert time.monotonic() < end and self._job.poll() is None, (self._slot / "stderr.txt").read_text()
            self._client.beat()
            time.sleep(0.05)

    def rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end)


def test_a_client_suspends_resumes_and_aborts_a_group(tmp_path: Path) -> None:
    """Suspended, neither VM computes and no output comes; aborted, nothing of them is left."""
    slot = tmp_path / "slot"
    outputs = counters(slot, COUNT.replace("-lt 24", "-lt 100000"))
    client = ClientSide(slot)

    def lengths() -> list[int]:
        return [each.stat().st_size if each.exists() else 0 for each in outputs]

    with subprocess.Popen(WRAPPER, cwd=slot, stderr=subprocess.DEVNULL) as job:
        playing = Playing(slot, job, client)
        playing.until(lambda: all(lengths()))
        machines = [json.loads(file.read_text())["process"][0] for file in ledger_dir().glob("*/entry.json")]
        vms = [psutil.Process(number) for number in machines]
        assert len(vms) == 2
        client.control("<suspend/>")
        playing.until(lambda: not any(uses_time(vm) for vm in vms))
        before, used = lengths(), [sum(vm.cpu_times()[:2]) for vm in vms]
        playing.rest(2.0)
        assert lengths() == before
        assert [sum(vm.cpu_times()[:2]) for vm in vms] == used, "a suspended job takes no processor time"
        client.control("<resume/>")
        playing.until(lambda: all(now > then for now, then in zip(lengths(), before, strict=True)))
        client.control("<abort/>")
        assert job.wait(60) == 0
    assert not (slot / "boinc_finish_called").exists()
    assert "the client's abort request" in (slot / "stderr.txt").read_text()
    assert left_behind(slot) == []


def uses_time(process: psutil.Process) -> bool:
    """Whether it has computed in the last half second."""
    before = process.cpu_times()[:2]
    time.sleep(0.5)
    return process.cpu_times()[:2] != before
