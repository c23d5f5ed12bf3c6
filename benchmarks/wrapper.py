"""What the wrapper itself costs, with the client's side of its slot in our hands.

In turn with two others in slots of the same kind (`peers/slot_apps.py`): a bare Python that starts the task and looks
once a second whether it has ended, and the limit, BOINC's runtime alone with a wait for the end. BOINC's own wrapper
is in the tables as published: it looks once a second and sleeps for 2 s at the end.

Memory and CPU time of a job on the host are those of the wrapper's process; what stands under `tree_` counts its helper
processes too, as proportional memory (pages that processes share are divided among them), without the task's program.
Those of a job in a VM are of the wrapper and its host agent, without QEMU. `first_task_ms` is from the wrapper's start
to the task's first word, `end_latency_ms` from its last word to the finish file. `status_s` is from a change of the
fraction done file to the shared memory; `suspend_s` from the client's message until the task's process stands still.

The short form measures memory, CPU time and latencies of a job on the host, for less time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import psutil

from benchmarks import SHORT
from benchmarks.cpu import cpu_seconds
from benchmarks.report import OURS, p99, rounds_of, show
from host_agent.wrapper.boinc.testing import ClientSide

ROOT = Path(__file__).parents[1]
START_S = 3.0  # not measured: reading job.xml, starting the task
MEASURE_S = 15.0 if SHORT else 60.0
ENDS = 5 if SHORT else 20
CHANGES = 20
SUSPENDS = 10
DEADLINE_S = 60.0
VM_DEADLINE_S = 180.0

WRAPPER = ("-m", "host_agent.wrapper.main")
POLLS, LIMIT = "bare Python, polls each second", "limit: BOINC's runtime alone"
PUBLISHED = "BOINC's wrapper, as published"
PROGRAMS = {
    OURS: WRAPPER,
    POLLS: ("-m", "benchmarks.peers.slot_apps", "polls"),
    LIMIT: ("-m", "benchmarks.peers.slot_apps", "runtime"),
}
# Soonest, mean and latest of: up to a second until it looks, and then 2 s.
PUBLISHED_END_S = (2.0, 2.5, 3.0)

# The time just after the program begins and just before it ends, in nanoseconds since 1970.
_BEGIN_AND_END = "date +%s%N > began\nexec date +%s%N > ended\n"
_SLEEP = "exec sleep 600\n"
_JOB = "<application>sh</application><command_line>task.sh</command_line>"


@contextmanager
def running(
    slot: Path, task: str, program: Sequence[str] = WRAPPER, env: dict[str, str] | None = None
) -> Iterator[tuple[ClientSide, psutil.Process]]:
    """A program in a slot, as a client starts it; it is asked to quit at the end."""
    (slot / "job.xml").write_text(f"<job_desc><task>{task}</task></job_desc>\n")
    side = ClientSide(slot)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    with (slot / "stderr.txt").open("ab") as log:
        child = psutil.Popen([sys.executable, "-P", *program], cwd=slot, env=environment, stdout=log, stderr=log)
    try:
        yield side, child
    finally:
        if child.poll() is None:
            side.control("<quit/>")
            _end(child)


def _end(child: psutil.Popen) -> None:
    """It has been asked to go; one that does not listen is killed with its task."""
    try:
        child.wait(DEADLINE_S)
    except subprocess.TimeoutExpired:
        for each in [*child.children(recursive=True), child]:
            each.kill()
        child.wait(DEADLINE_S)


def _beat(side: ClientSide, seconds: float) -> None:
    """Be the client for a while: once a second it beats, and takes what it finds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        side.beat()
        side.status()
        time.sleep(1.0)


def costs(slot: Path, program: Sequence[str] = WRAPPER) -> dict[str, float]:
    """Memory and CPU time of a program while its task sleeps."""
    (slot / "task.sh").write_text(_SLEEP)
    with running(slot, _JOB, program) as (side, wrapper):
        _beat(side, START_S)
        ours = [wrapper, *(each for each in wrapper.children(recursive=True) if "sleep" not in each.name())]
        found = _spent(ours, side, slot)
        for each in wrapper.children(recursive=True):
            if each.name() == "sleep" and program is not WRAPPER:
                each.kill()  # these do not know how to
        return found


def _spent(ours: list[psutil.Process], side: ClientSide, slot: Path) -> dict[str, float]:
    """Of the first process, and of all."""
    before, began = [cpu_seconds([each.pid]) for each in ours], time.monotonic()
    _beat(side, MEASURE_S)
    spent = [cpu_seconds([each.pid]) - first for each, first in zip(ours, before, strict=True)]
    assert ours[0].status() != psutil.STATUS_ZOMBIE, (slot / "stderr.txt").read_text()
    minutes = (time.monotonic() - began) / 60
    return {
        "rss_mb": ours[0].memory_info().rss / 1e6,
        "tree_rss_mb": sum(each.memory_info().rss for each in ours) / 1e6,
        "tree_pss_mb": sum(each.memory_full_info().pss for each in ours) / 1e6,
        "cpu_s_per_min": spent[0] / minutes,
        "tree_cpu_s_per_min": sum(spent) / minutes,
    }


def vm_costs(slot: Path) -> dict[str, float]:
    """The same of a job in a VM, with the host agent and without what runs the VM."""
    (slot / "task.sh").write_text("echo on\nexec sleep 600\n")
    task = "<virtualmachine>bench</virtualmachine><application>sh</application><command_line>task.sh</command_line>"
    task += "<copy_file_to_VM>task.sh</copy_file_to_VM><stdout_filename>said</stdout_filename>"
    with running(slot, task, env={"VMWRAPPER_RUNTIME": str(slot / "run")}) as (side, wrapper):
        until = time.monotonic() + VM_DEADLINE_S
        said = slot / "said"
        while not (said.exists() and said.read_bytes()):
            if time.monotonic() > until or not wrapper.is_running():
                raise TimeoutError(f"the task in the VM did not begin: {(slot / 'stderr.txt').read_text()[-2000:]}")
            _beat(side, 0.5)
        _beat(side, START_S)
        agents = [each for each in wrapper.children(recursive=True) if "host_agent.main" in " ".join(each.cmdline())]
        found = _spent([wrapper, *agents[:1]], side, slot)
        assert agents, "the wrapper has no host agent"
        return found


def task_times(slot: Path, program: Sequence[str] = WRAPPER) -> tuple[float, float]:
    """Seconds from the start to the task's first word, and from its last to the finish file."""
    (slot / "task.sh").write_text(_BEGIN_AND_END)
    for name in ("wrapper_checkpoint.txt", "boinc_finish_called", "ended", "began"):
        (slot / name).unlink(missing_ok=True)
    started = time.time()
    with running(slot, _JOB, program) as (_side, wrapper):
        wrapper.wait(DEADLINE_S)
        finished = (slot / "boinc_finish_called").stat().st_mtime_ns
    began, ended = (int((slot / name).read_text()) for name in ("began", "ended"))
    return began / 1e9 - started, (finished - ended) / 1e9


def status_delay(slot: Path) -> dict[str, float]:
    """From a change of what a task says of itself to the client's side of the memory."""
    (slot / "task.sh").write_text(_SLEEP)
    latencies = []
    with running(slot, f"{_JOB}<fraction_done_filename>fraction</fraction_done_filename>") as (side, _wrapper):
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
    (slot / "task.sh").write_text(_SLEEP)
    latencies = []
    with running(slot, _JOB) as (side, wrapper):
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
    """Measure all of it; five minutes, one in the short form."""
    with tempfile.TemporaryDirectory(prefix="vmwrapper-bench-") as name:
        folder = Path(name)

        def slot(label: str) -> Path:
            place = folder / label
            place.mkdir(exist_ok=True)
            return place

        cost = {who: costs(slot(f"costs-{number}"), program) for number, (who, program) in enumerate(PROGRAMS.items())}
        firsts: dict[str, list[float]] = {who: [] for who in PROGRAMS}
        ends: dict[str, list[float]] = {who: [] for who in PROGRAMS}
        for _ in rounds_of(ENDS):
            for number, (who, program) in enumerate(PROGRAMS.items()):
                first, end = task_times(slot(f"ends-{number}"), program)
                firsts[who].append(first)
                ends[who].append(end)
        vm = {} if SHORT else vm_costs(slot("vm"))
        delays = {} if SHORT else status_delay(slot("status")) | suspend_delay(slot("suspend"))
    for title, key in (("memory, RSS, MB", "rss_mb"), ("CPU time, s a minute", "cpu_s_per_min")):
        what, _, unit = title.rpartition(", ")
        show(f"a job on the host: {what}", {who: [each[key]] for who, each in cost.items()}, unit)
    show("from the start to the task's first word", firsts, "ms", scale=1e3)
    show("from the task's last word to the finish file", {**ends, PUBLISHED: PUBLISHED_END_S}, "ms", scale=1e3)
    ours = cost[OURS]
    found = {
        "host_job_rss_mb": ours["rss_mb"],
        "host_job_cpu_s_per_min": ours["cpu_s_per_min"],
        "host_job_tree_pss_mb": ours["tree_pss_mb"],
        "host_job_tree_cpu_s_per_min": ours["tree_cpu_s_per_min"],
        "rss_ratio_to_runtime": ours["rss_mb"] / cost[LIMIT]["rss_mb"],
        "cpu_ratio_to_runtime": ours["cpu_s_per_min"] / cost[LIMIT]["cpu_s_per_min"],
        "first_task_ms": median(firsts[OURS]) * 1e3,
        "first_task_ratio_to_runtime": median(firsts[OURS]) / median(firsts[LIMIT]),
        "end_latency_ms": median(ends[OURS]) * 1e3,
        "end_latency_p99_ms": p99(ends[OURS]) * 1e3,
        "end_latency_ratio_to_polling": median(ends[OURS]) / median(ends[POLLS]),
    }
    if vm:
        found |= {"vm_job_rss_mb": vm["tree_rss_mb"], "vm_job_pss_mb": vm["tree_pss_mb"]}
        found |= {"vm_job_cpu_s_per_min": vm["tree_cpu_s_per_min"]}
    return found | delays
