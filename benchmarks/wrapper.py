"""What the wrapper itself costs in a job that stays on the host, with the client's side of its slot in our hands.

Goals: `rss_mb` 20, `cpu_s_per_minute` 0.08, `end_to_finish_max_ms` 50, `status_max_s` 1, `suspend_max_s` 1.
Memory and CPU time are those of the wrapper's process; what stands under `tree_` counts its helper processes too, as
proportional memory (pages that processes share are divided among them), without the task's own program.
`status_s` is from a change of the fraction done file to the shared memory, with a client that takes what is there;
`suspend_s` from the client's message until the task's process stands still.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import psutil

from host_agent.wrapper.boinc.testing import ClientSide

ROOT = Path(__file__).parents[1]
START_S = 3.0  # not measured: reading job.xml, starting the task
MEASURE_S = 30.0
ENDS = 15
CHANGES = 20
SUSPENDS = 10
DEADLINE_S = 60.0

# The time just before the program ends, in nanoseconds since 1970.
_END = "exec date +%s%N > ended\n"


@contextmanager
def _running(slot: Path, task: str) -> Iterator[tuple[ClientSide, psutil.Process]]:
    (slot / "job.xml").write_text(f"<job_desc><task>{task}</task></job_desc>\n")
    side = ClientSide(slot)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (slot / "stderr.txt").open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "host_agent.wrapper.main"], cwd=slot, env=environment, stdout=log, stderr=log
        )
    try:
        yield side, psutil.Process(child.pid)
    finally:
        if child.poll() is None:
            side.control("<quit/>")
        child.wait(DEADLINE_S)


def _cpu_s(process: psutil.Process) -> float:
    """To the nanosecond; `psutil.cpu_times` counts in ticks of 10 ms."""
    return int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[0]) / 1e9


def _beat(side: ClientSide, seconds: float) -> None:
    """Be the client for a while: once a second it beats, and takes what it finds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        side.beat()
        side.status()
        time.sleep(1.0)


def costs(slot: Path) -> dict[str, float]:
    """Memory and CPU time while a task runs."""
    with _running(slot, "<application>sleep</application><command_line>600</command_line>") as (side, wrapper):
        _beat(side, START_S)
        ours = [wrapper, *(each for each in wrapper.children(recursive=True) if "sleep" not in each.name())]
        before, began = [_cpu_s(each) for each in ours], time.monotonic()
        _beat(side, MEASURE_S)
        spent = [_cpu_s(each) - first for each, first in zip(ours, before, strict=True)]
        assert wrapper.status() != psutil.STATUS_ZOMBIE, (slot / "stderr.txt").read_text()
        minutes = (time.monotonic() - began) / 60
        return {
            "rss_mb": wrapper.memory_info().rss / 1e6,
            "tree_pss_mb": sum(each.memory_full_info().pss for each in ours) / 1e6,
            "cpu_s_per_minute": spent[0] / minutes,
            "tree_cpu_s_per_minute": sum(spent) / minutes,
        }


def end_to_finish(slot: Path) -> dict[str, float]:
    """From a task's last word to the finish file."""
    (slot / "task.sh").write_text(_END)
    latencies = []
    for _ in range(ENDS):
        for name in ("wrapper_checkpoint.txt", "boinc_finish_called", "ended"):
            (slot / name).unlink(missing_ok=True)
        with _running(slot, "<application>sh</application><command_line>task.sh</command_line>") as (_side, wrapper):
            wrapper.wait(DEADLINE_S)
            finished = (slot / "boinc_finish_called").stat().st_mtime_ns
            latencies.append((finished - int((slot / "ended").read_text())) / 1e6)
    return {"end_to_finish_p50_ms": median(latencies), "end_to_finish_max_ms": max(latencies)}


def status_delay(slot: Path) -> dict[str, float]:
    """From a change of what a task says of itself to the client's side of the memory."""
    task = (
        "<application>sleep</application><command_line>600</command_line>"
        "<fraction_done_filename>fraction</fraction_done_filename>"
    )
    latencies = []
    with _running(slot, task) as (side, _wrapper):
        _beat(side, START_S)
        for number in range(1, CHANGES + 1):
            new = slot / "fraction.new"
            new.write_text(f"{number / 100}")
            new.replace(slot / "fraction")
            began = time.monotonic()
            while f"<fraction_done>{number / 100:e}<" not in (side.status() or ""):
                if time.monotonic() > began + DEADLINE_S:
                    raise TimeoutError("the status was never told")
                side.beat()
                time.sleep(0.01)
            latencies.append(time.monotonic() - began)
            time.sleep((number * 0.37) % 1.0)  # so that changes fall on all moments of a second
    return {"status_p50_s": median(latencies), "status_max_s": max(latencies)}


def suspend_delay(slot: Path) -> dict[str, float]:
    """From the client's message to a task that stands still."""
    latencies = []
    with _running(slot, "<application>sleep</application><command_line>600</command_line>") as (side, wrapper):
        _beat(side, START_S)
        [task] = [each for each in wrapper.children(recursive=True) if each.name() == "sleep"]
        for number in range(SUSPENDS):
            began = time.monotonic()
            side.control("<suspend/>")
            while task.status() != psutil.STATUS_STOPPED:
                if time.monotonic() > began + DEADLINE_S:
                    raise TimeoutError("the task was never suspended")
                time.sleep(0.005)
            latencies.append(time.monotonic() - began)
            side.control("<resume/>")
            while task.status() == psutil.STATUS_STOPPED:
                if time.monotonic() > began + 2 * DEADLINE_S:
                    raise TimeoutError("the task was never resumed")
                time.sleep(0.005)
            side.beat()
            time.sleep((number * 0.37) % 1.0)
    return {"suspend_p50_s": median(latencies), "suspend_max_s": max(latencies)}


def run() -> dict[str, float]:
    """Measure all of it."""
    found: dict[str, float] = {}
    for part in (costs, end_to_finish, status_delay, suspend_delay):
        with tempfile.TemporaryDirectory() as directory:
            found |= part(Path(directory))
    return found
