"""One task, from its start to its end, while the client's wishes are followed and it is told how far we are."""

from __future__ import annotations

import time
from pathlib import Path

import attrs

from .boinc.runtime import SERVICE_S, Runtime
from .checkpoint import Checkpoint, write_checkpoint
from .events import Events
from .job import Job, Task
from .log import Log
from .services import Services
from .tasks import RunningTask, TaskEnd, TaskState

TICK_S = 1.0  # how often the client is asked; the end of a task wakes us at once
SEARCH_TICK_S = 0.1  # while a host agent's endpoint file is looked for, which wakes nobody


class QuitError(Exception):
    """Not an error of the job: the client, or a signal, wants us to end now and be started again later."""


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
    trickle_s: float
    checkpoint: Checkpoint = attrs.field(factory=Checkpoint)
    clock: Clock = attrs.field(factory=Clock)
    _shown: tuple[float, float] = (-1.0, 0.0)  # fraction and time of the last progress line
    _trickled: float = 0.0

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from an earlier run."""
        self.checkpoint = checkpoint
        self.clock.seconds = self._trickled = checkpoint.run_time_s

    def save(self, done: int, cpu_s: float) -> None:
        """Write a checkpoint."""
        self.checkpoint = Checkpoint(done, cpu_s, self.clock.tick())
        write_checkpoint(self.slot, self.checkpoint)
        self.runtime.checkpoint_completed()

    def report(self, task: Task | None, cpu_s: float, part: float) -> None:
        """Tell the client, and whoever watches: `part` of `task` is done, and all tasks before it."""
        done = sum(each.weight for each in self.job.tasks[: self.checkpoint.tasks_done])
        fraction = (done + (task.weight * part if task else 0.0)) / self.job.total_weight
        self.runtime.report(cpu_s, self.checkpoint.cpu_s, fraction)
        run_time = self.clock.tick()
        if self.trickle_s > 0 and run_time - self._trickled >= self.trickle_s:
            self._trickled = run_time
            self.runtime.send_trickle_up("cpu_time", f"<cpu_time>{run_time:f}</cpu_time>")
        if fraction - self._shown[0] >= 0.05 or run_time - self._shown[1] >= 30:
            self._shown = (fraction, run_time)
            what = f", {task.title}" if task else ""
            self.log.progress(f"{fraction:6.1%} done, CPU {cpu_s:.1f} s, run time {run_time:.1f} s{what}")


@attrs.define(eq=False)
class TaskLoop:
    """Runs tasks one at a time."""

    slot: Path
    runtime: Runtime
    events: Events
    log: Log
    progress: Progress
    services: Services

    def run(self, task: Task, running: RunningTask, counted: bool = True) -> tuple[TaskEnd, float]:
        """Run one task to its end; returns how it ended and its CPU seconds.

        `counted`: it is one of the job's own tasks, with a weight and checkpoints. Raises QuitError and TaskError;
        the task does not run any more then.
        """
        clock = self.progress.clock
        start, base = clock.tick(), self.progress.checkpoint.cpu_s
        saved = _Changed(self.slot / task.checkpoint_filename) if task.checkpoint_filename and counted else None
        self.log.say(f"running {task.title}{' ' if task.command_line else ''}{task.command_line}")
        state, expired = TaskState.READY, False
        try:
            self.follow_client(running)
            running.run()
            while (end := running.poll()) is None:
                if running.state is not state:
                    state = running.state
                    self.log.say(f"{task.title}: {state.value}")
                self.services.check()
                self.follow_client(running)
                cpu_s = base + running.cpu_seconds()
                self.progress.report(task if counted else None, cpu_s, running.fraction() if counted else 0.0)
                if saved is not None and saved():
                    self.progress.save(self.progress.checkpoint.tasks_done, cpu_s)
                timeout = SEARCH_TICK_S if state is TaskState.WAITING_FOR_AGENT else TICK_S
                left = task.time_limit - (clock.tick() - start) if task.time_limit and not expired else None
                if left is not None and left <= 0:
                    expired = True
                    running.expire()
                    continue  # a task on the host has ended now; one in a VM says so soon
                self._wait(timeout if left is None or not clock.running else min(timeout, left))
        finally:
            if running.state is not TaskState.DONE:
                running.kill()
        cpu = running.cpu_seconds()
        if end.ok:
            self.log.say(f"{task.title} {end.sentence}; CPU {cpu:.2f} s, run time {clock.tick() - start:.2f} s")
        return end, cpu

    def _wait(self, timeout_s: float) -> None:
        """Until something happens, at most so long. A client's message wakes nobody, so it is looked for in between."""
        until = time.monotonic() + timeout_s
        left = timeout_s
        while left > 0 and not self.events.wait(min(left, SERVICE_S)) and not self.runtime.service():
            left = until - time.monotonic()

    def follow_client(self, running: RunningTask) -> None:
        """Suspend, resume or end the task as the client, or a signal, says. Raises QuitError."""
        status = self.runtime.poll()
        if self.events.quit_signal:
            raise QuitError(self.events.quit_signal)
        if status.quit_reason:
            raise QuitError(status.quit_reason)
        clock = self.progress.clock
        clock.tick()
        if status.suspended == clock.running:
            clock.running = not status.suspended
            self.log.say("suspended by the client" if status.suspended else "resumed by the client")
        # Also for a task that begins while the client wants quiet.
        (running.stop if status.suspended else running.resume)()


class _Changed:
    """Whether a file was written anew since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._look()

    def __call__(self) -> bool:
        now = self._look()
        changed = now is not None and now != self._seen
        self._seen = now
        return changed

    def _look(self) -> tuple[int, int] | None:
        try:
            info = self._path.stat()
        except OSError:
            return None
        return info.st_mtime_ns, info.st_ino
