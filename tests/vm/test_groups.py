"""Parallel groups in real virtual machines, and two wrappers at once on one host."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

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


def test_a_group_that_is_told_to_quit_goes_on_where_it_was(tmp_path: Path) -> None:
    slot = tmp_path / "slot"
    slot.mkdir()
    (slot / "job.xml").write_text(f"<job_desc>{COUNTERS}</job_desc>")
    (slot / "count.sh").write_text(COUNT)
    (slot / "count.sh").chmod(0o755)
    outputs = [slot / f"out-{name}" for name in "abc"]
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
