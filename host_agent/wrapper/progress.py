"""How far a job is: its clock, its checkpoint on the disk, and what the client, graphics and watchers are told."""

from __future__ import annotations

import time
from pathlib import Path

import attrs

from .boinc.runtime import Runtime, Status, critical_section
from .checkpoint import Checkpoint, write_checkpoint
from .job import Job, Task
from .log import Log
from .state import StateFile
from .trickles import Trickles, Work


@attrs.define(eq=False)
class Clock:
    """Run time of the job: seconds in which it was not suspended, over all its starts."""

    seconds: float = 0.0
    running: bool = True
    _last: float = attrs.field(factory=time.monotonic)

    def tick(self) -> float:
        """Bring it up to date."""
        now = time.monotonic()
        if self.running:
            self.seconds += now - self._last
        self._last = now
        return self.seconds


@attrs.define(eq=False)
class Progress:
    """How far the job is: CPU time and weight of what is done, and the checkpoint on the disk."""

    job: Job
    slot: Path
    runtime: Runtime
    log: Log
    state: StateFile
    trickles: Trickles
    checkpoint: Checkpoint = attrs.field(factory=Checkpoint)
    clock: Clock = attrs.field(factory=Clock)
    fraction: float = 0.0
    _shown: tuple[float, float] = (-1.0, 0.0)  # fraction and time of the last progress line

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from an earlier run."""
        self.checkpoint = checkpoint
        self.clock.seconds = self.trickles.sent_at_s = checkpoint.run_time_s

    def save(self, done: int, cpu_s: float) -> None:
        """Write a checkpoint."""
        with critical_section(self.runtime):
            self.checkpoint = Checkpoint(done, cpu_s, self.clock.tick())
            write_checkpoint(self.slot, self.checkpoint)
            self.state.change(temporary_exits=0)
            self.runtime.checkpoint_completed()

    def work(self, cpu_s: float) -> Work:
        """What a message to the project says."""
        return Work(self.clock.tick(), cpu_s, self.fraction, self.checkpoint.tasks_done)

    def report(self, task: Task | None, cpu_s: float, part: float, status: Status, other_pid: int = 0) -> None:
        """Tell the client, and whoever watches: `part` of `task` is done, and all tasks before it."""
        done = sum(each.weight for each in self.job.tasks[: self.checkpoint.tasks_done])
        self.fraction = (done + (task.weight * part if task else 0.0)) / self.job.total_weight
        self.runtime.report(cpu_s, self.checkpoint.cpu_s, self.fraction, other_pid=other_pid)
        run_time = self.clock.tick()
        self.trickles.tick(self.work(cpu_s))
        if self.job.enable_graphics_support:
            from .graphics import write_graphics_status

            write_graphics_status(self.slot, status, cpu_s, run_time, self.fraction)
        if self.fraction - self._shown[0] >= 0.05 or run_time - self._shown[1] >= 30:
            self._shown = (self.fraction, run_time)
            what = f", {task.title}" if task else ""
            self.log.progress(f"{self.fraction:6.1%} done, CPU {cpu_s:.1f} s, run time {run_time:.1f} s{what}")
