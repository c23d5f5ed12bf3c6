"""One task, from its start to its end, while the client's wishes are followed and it is told how far we are."""

from __future__ import annotations

import time
from pathlib import Path

import attrs

from .boinc.runtime import SERVICE_S, Leave, Runtime, Status
from .events import Events
from .job import Task
from .log import Log
from .progress import Progress
from .services import Services
from .sporadic import SporadicFiles
from .tasks import ENDED_EARLY, TIME_LIMIT, RunningTask, TaskEnd, TaskState

TICK_S = 1.0  # how often the client is asked; the end of a task wakes us at once
SEARCH_TICK_S = 0.1  # while a host agent's endpoint file is looked for, which wakes nobody
EARLY_GRACE_S = 10.0  # for a program that the project wants no more of


class QuitError(Exception):
    """Not an error of the job: the client, or a signal, wants us to end now and be started again later."""


@attrs.define(eq=False)
class TaskLoop:
    """Runs tasks one at a time."""

    slot: Path
    runtime: Runtime
    events: Events
    log: Log
    progress: Progress
    services: Services
    sporadic: SporadicFiles | None = None
    status: Status = attrs.field(factory=Status)

    def run(self, task: Task, running: RunningTask, counted: bool = True) -> tuple[TaskEnd, float]:
        """Run one task to its end; returns how it ended, and the CPU seconds of it and of the daemons meanwhile.

        `counted`: it is one of the job's own tasks, with a weight and checkpoints. Raises QuitError and TaskError;
        the task does not run any more then.
        """
        progress = self.progress
        base, beside = progress.checkpoint.cpu_s, self.services.cpu_seconds(now=True)
        saved = _Changed(self.slot / task.checkpoint_filename) if task.checkpoint_filename and counted else None
        limits = _Limits(progress, task, running, counted)
        state = TaskState.READY
        self.log.say(f"running {task.title}{' ' if task.command_line else ''}{task.command_line}")

        def cpu_seconds(now: bool = False) -> float:
            return running.cpu_seconds(now) + self.services.cpu_seconds(now) - beside

        try:
            self.follow_client(running)
            running.run()
            while (end := running.poll()) is None:
                if running.state is not state:
                    state = running.state
                    self.log.say(f"{task.title}: {state.value}")
                self.services.check()
                self.follow_client(running)
                cpu_s = base + cpu_seconds()
                part = running.fraction() if counted else 0.0
                progress.report(task if counted else None, cpu_s, part, self.status, running.other_pid())
                if saved is not None and saved():
                    progress.save(progress.checkpoint.tasks_done, base + cpu_seconds(now=True))
                if limits.enforce():
                    continue  # a task on the host has ended now; one in a VM says so soon
                self._wait(min(SEARCH_TICK_S if state is TaskState.WAITING_FOR_AGENT else TICK_S, limits.left_s()))
        except QuitError:
            if self.status.leave is not Leave.ABORT:
                running.leave()
            raise
        finally:
            if running.state is not TaskState.DONE:
                running.kill()
                self._say_last_words(task, running)
        if end.ok:
            self.log.say(
                f"{task.title} {end.sentence}; CPU {running.cpu_seconds():.2f} s, run time {limits.ran_s:.2f} s"
            )
        return end, cpu_seconds(now=True)

    def _say_last_words(self, task: Task, running: RunningTask) -> None:
        """An aborted job's files go with its slot; of its errors, only what our log holds reaches the project."""
        if self.status.leave is Leave.ABORT and (lines := running.error_tail()):
            self.log.say(f"the end of {task.stderr_filename}:\n{lines}")

    def _wait(self, timeout_s: float) -> None:
        """Until something happens, at most so long. A client's message wakes nobody, so it is looked for in between."""
        until = time.monotonic() + timeout_s
        left = timeout_s
        while left > 0 and not self.events.wait(min(left, SERVICE_S)) and not self.runtime.service():
            left = until - time.monotonic()

    def follow_client(self, running: RunningTask | None = None) -> None:
        """Suspend, resume or end the task as the client, or a signal, says. Raises QuitError."""
        self.status = status = self.runtime.poll()
        if self.events.quit_signal:
            raise QuitError(self.events.quit_signal)
        if status.quit_reason:
            raise QuitError(status.quit_reason)
        if status.reread:
            self.runtime.init_data()
        if self.sporadic is not None:
            self.sporadic.tick(status)
        self.progress.trickles.follow_project()
        clock = self.progress.clock
        clock.tick()
        if status.suspended == clock.running:
            clock.running = not status.suspended
            self.log.say("suspended by the client" if status.suspended else "resumed by the client")
        self.services.follow(status.suspended)
        if running is not None:  # also one that begins while the client wants quiet
            (running.stop if status.suspended else running.resume)()


class _Limits:
    """Why a task may have to end before its program does: its time limit, or the project's wish."""

    def __init__(self, progress: Progress, task: Task, running: RunningTask, counted: bool) -> None:
        self._progress = progress
        self._time_limit = task.time_limit
        self._running = running
        self._counted = counted
        self._start = progress.clock.tick()
        self._asked_at: float | None = None  # when the program was asked to end
        self._expired = False

    @property
    def ran_s(self) -> float:
        return self._progress.clock.tick() - self._start

    def enforce(self) -> bool:
        """End the task if its time is over; whether it was ended now."""
        if self._expired:
            return False
        if self._counted and self._progress.state.state.end_early:
            if self._asked_at is None:
                self._asked_at = time.monotonic()
                self._running.ask_to_end()
            elif time.monotonic() - self._asked_at >= EARLY_GRACE_S:
                self._expired = True
                self._running.expire(ENDED_EARLY)
        elif self._time_limit and self.ran_s >= self._time_limit:
            self._expired = True
            self._running.expire(TIME_LIMIT)
        return self._expired

    def left_s(self) -> float:
        """Until `enforce()` has something to do."""
        if not self._time_limit or self._expired or not self._progress.clock.running:
            return TICK_S
        return max(0.01, self._time_limit - self.ran_s)


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
