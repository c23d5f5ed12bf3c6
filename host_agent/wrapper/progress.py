"""How far a job is: its clock, its checkpoint on the disk, and what the client, graphics and watchers are told."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

from .boinc.runtime import Runtime, Status, critical_section
from .checkpoint import Checkpoint, write_checkpoint
from .job import Job
from .log import Log
from .state import StateFile
from .trickles import Trickles, Work


class Clock:
    """Run time of the job: seconds in which it was not suspended, over all its starts."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.running = True
        self._last = time.monotonic()

    def tick(self) -> float:
        """Bring it up to date."""
        now = time.monotonic()
        if self.running:
            self.seconds += now - self._last
        self._last = now
        return self.seconds


class Now(NamedTuple):
    """How things stand: what there is to tell beside the checkpoint."""

    cpu_s: float  # of the whole job
    weight: float = 0.0  # of what is done of the tasks that run
    title: str = ""  # what runs
    other_pid: int = 0  # a process that is not below ours and works for us
    sent_bytes: float = 0.0
    received_bytes: float = 0.0


class Progress:
    """How far the job is: CPU time and weight of what is done, and the checkpoint on the disk."""

    def __init__(
        self,
        job: Job,
        slot: Path,
        runtime: Runtime,
        log: Log,
        state: StateFile,
        trickles: Trickles,
    ) -> None:
        self.job = job
        self.slot = slot
        self.runtime = runtime
        self.log = log
        self.state = state
        self.trickles = trickles
        self.checkpoint = Checkpoint()
        self.clock = Clock()
        self.fraction = 0.0
        self._shown = (-1.0, 0.0)  # fraction and time of the last progress line

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from an earlier run."""
        self.checkpoint = checkpoint
        self.clock.seconds = self.trickles.sent_at_s = checkpoint.run_time_s

    def save(self, done: int, cpu_s: float, **state: Any) -> None:
        """Write a checkpoint, and `state` into the state file."""
        with critical_section(self.runtime):
            self.checkpoint = Checkpoint(done, cpu_s, self.clock.tick())
            write_checkpoint(self.slot, self.checkpoint)
            self.state.change(temporary_exits=0, **state)
            self.runtime.checkpoint_completed()

    def done_of_group(self) -> tuple[int, ...]:
        """Numbers of the tasks of the present step that are done; what a kill left of an earlier step's is not."""
        return tuple(number for number in self.state.state.group_done if number > self.checkpoint.tasks_done)

    def work(self, cpu_s: float) -> Work:
        """What a message to the project says."""
        return Work(self.clock.tick(), cpu_s, self.fraction, self.checkpoint.tasks_done)

    def report(self, now: Now, status: Status) -> None:
        """Tell the client, and whoever watches."""
        cpu_s, title = now.cpu_s, now.title
        done = sum(each.weight for each in self.job.tasks[: self.checkpoint.tasks_done])
        self.fraction = (done + now.weight) / self.job.total_weight
        self.runtime.report(
            cpu_s,
            self.checkpoint.cpu_s,
            self.fraction,
            other_pid=now.other_pid,
            bytes_sent=now.sent_bytes,
            bytes_received=now.received_bytes,
        )
        run_time = self.clock.tick()
        self.trickles.tick(self.work(cpu_s))
        if self.job.enable_graphics_support:
            from .graphics import write_graphics_status

            write_graphics_status(self.slot, status, cpu_s, run_time, self.fraction)
        if self.fraction - self._shown[0] >= 0.05 or run_time - self._shown[1] >= 30:
            self._shown = (self.fraction, run_time)
            what = f", {title}" if title else ""
            self.log.progress(f"{self.fraction:6.1%} done, CPU {cpu_s:.1f} s, run time {run_time:.1f} s{what}")
