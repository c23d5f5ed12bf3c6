"""One step of a job: a task, or the tasks of a parallel group, which run at once.

A group is one step for the checkpoint, too: BOINC's file counts whole steps. Which tasks of an unfinished group are
done already is in the state file, so that they are not run again. Its part of the job's progress is the sum of the
tasks' weights, each times its own fraction. When one task fails, the others are ended, and the job fails.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .boinc.runtime import Leave, Status
from .job import Task
from .log import Log
from .progress import Now, Progress
from .services import Services
from .tasks import ENDED_EARLY, TIME_LIMIT, RunningTask, TaskEnd, TaskState

TICK_S = 1.0  # how often the client is asked; the end of a task wakes us at once
SEARCH_TICK_S = 0.1  # while a host agent's endpoint file is looked for, which wakes nobody
EARLY_GRACE_S = 10.0  # for a program that the project wants no more of
NOTE_TIME_S = 60.0  # how often the time of tasks with a time limit is written down, if nothing else is
LEAVE_DEADLINE_S = 40.0  # of the minute that the client gives us, for all tasks together


class Member:
    """One task of a step."""

    def __init__(
        self,
        task: Task,
        running: RunningTask,
        limits: _Limits,
        saved: _Changed | None,  # whether its program has written its own checkpoint
        state: TaskState = TaskState.READY,  # as last told
        end: TaskEnd | None = None,
        safe_cpu_s: float = 0.0,  # CPU time of work that will not be done again
    ) -> None:
        self.task = task
        self.running = running
        self.limits = limits
        self.saved = saved
        self.state = state
        self.end = end
        self.safe_cpu_s = safe_cpu_s


class Step:
    """Tasks that run at once. `counted`: they are the job's own, with weights and checkpoints."""

    def __init__(
        self,
        tasks: Sequence[tuple[Task, RunningTask]],
        slot: Path,
        log: Log,
        progress: Progress,
        services: Services,
        counted: bool = True,
    ) -> None:
        self._log = log
        self._progress = progress
        self._services = services
        self._counted = counted
        self._base = progress.checkpoint.cpu_s - sum(running.counted_s for _, running in tasks)
        self._beside = services.cpu_seconds(now=True)  # of the daemons, before
        self._before = progress.done_of_group() if counted else ()  # by an earlier wrapper
        self._time_noted = progress.clock.tick()
        self.members = [
            Member(
                task,
                running,
                _Limits(progress, task, running, counted),
                _Changed(slot / task.checkpoint_filename) if _saves_itself(task) and counted else None,
                safe_cpu_s=running.counted_s,
            )
            for task, running in tasks
        ]

    def begin(self) -> None:
        """Start all of them. Raises TaskError."""
        for member in self.members:
            task = member.task
            self._log.say(f"running {task.title}{' ' if task.command_line else ''}{task.command_line}")
            member.running.run()

    @property
    def running(self) -> Iterator[RunningTask]:
        """Those that have not ended."""
        return (member.running for member in self.members if member.end is None)

    def over(self) -> bool:
        """Look at every task: whether all have ended, or one so that the job does not go on. Raises TaskError."""
        for member in self.members:
            if member.end is not None:
                continue
            end = member.running.poll()
            if end is None:
                if member.running.state is not member.state:
                    member.state = member.running.state
                    self._log.say(f"{member.task.title}: {member.state.value}")
                continue
            member.end = end
            if not end.ok:
                return True
            self._ended(member, end)
        return all(member.end is not None for member in self.members)

    @property
    def failed(self) -> Member | None:
        """The task that failed, and its step with it."""
        return next((member for member in self.members if member.end is not None and not member.end.ok), None)

    def _ended(self, member: Member, end: TaskEnd) -> None:
        member.safe_cpu_s = member.running.cpu_seconds(now=True)
        self._log.say(
            f"{member.task.title} {end.sentence}; CPU {member.safe_cpu_s:.2f} s, run time {member.limits.ran_s:.2f} s"
        )
        if not self._counted or len(self.members) + len(self._before) == 1:
            return
        done = [each.task.number for each in self.members if each.end is not None]
        if len(done) < len(self.members):  # else the step's end is written down, by whoever runs it
            records = self._progress.state.state.commands
            self._progress.save(
                self._progress.checkpoint.tasks_done,
                self._safe_cpu_s(),
                group_done=(*self._before, *done),
                commands=tuple(record for record in records if record.task != member.task.number),
                ran_s=self._ran_s(),
            )

    def keep(self) -> None:
        """A VM was kept, or a program has saved its own state: what it has computed so far is not lost any more."""
        wanted = self._counted and self._progress.runtime.time_to_checkpoint()
        for member in self.members:
            if member.end is not None:
                continue
            if member.saved is not None and member.saved():
                member.safe_cpu_s = member.running.cpu_seconds(now=True)
                self._progress.save(self._progress.checkpoint.tasks_done, self._safe_cpu_s(), ran_s=self._ran_s())
            elif self._counted and (safe := member.running.kept(wanted)) is not None:
                member.safe_cpu_s = safe
                self._save_vm_task(member)
        self._note_time(NOTE_TIME_S)

    def _note_time(self, every_s: float) -> None:
        """Time limits count over restarts, whatever else of the task goes on or begins anew."""
        now = self._progress.clock.tick()
        if now - self._time_noted >= every_s and (ran_s := self._ran_s()):
            self._time_noted = now
            with contextlib.suppress(OSError):  # a full disk shows elsewhere; this is the time since the last note
                self._progress.state.change(ran_s=ran_s)

    def _ran_s(self) -> dict[str, float]:
        """Of the tasks that have a time limit, and have not ended."""
        members = [each for each in self.members if self._counted and each.end is None and each.task.time_limit]
        return {str(each.task.number): round(each.limits.ran_s, 3) for each in members}

    def _save_vm_task(self, member: Member) -> None:
        number, records = member.task.number, self._progress.state.state.commands
        counted = (each._replace(cpu_s=member.safe_cpu_s) if each.task == number else each for each in records)
        try:
            self._progress.save(
                self._progress.checkpoint.tasks_done, self._safe_cpu_s(), commands=tuple(counted), ran_s=self._ran_s()
            )
        except OSError as error:
            # What is kept is kept: after a restart the VM goes on from it, and only CPU time is forgotten.
            self._log.say(f"{member.task.title}: its checkpoint cannot be written down: {error.strerror}")

    def cpu_seconds(self, now: bool = False) -> float:
        """Of the job: what was before, these tasks, and the daemons meanwhile."""
        return self._with_daemons(sum(member.running.cpu_seconds(now) for member in self.members), now)

    def _safe_cpu_s(self) -> float:
        return self._with_daemons(sum(member.safe_cpu_s for member in self.members), now=True)

    def _with_daemons(self, tasks_cpu_s: float, now: bool) -> float:
        return self._base + tasks_cpu_s + self._services.cpu_seconds(now) - self._beside

    def now(self) -> Now:
        """What there is to tell of them."""
        if not self._counted:
            return Now(self.cpu_seconds())
        tasks = self._progress.job.tasks
        weight = sum(task.weight for task in tasks if task.number in self._before)
        weight += sum(member.task.weight * member.running.fraction() for member in self.members)
        active = [member for member in self.members if member.end is None]
        titles = ", ".join(member.task.title for member in active)
        # The client's protocol has room for one process: it does not take that one's CPU time for the volunteer's.
        pid = next((pid for member in active if (pid := member.running.other_pid())), 0)
        traffic = [member.running.traffic() for member in self.members]
        sent, received = sum(each[0] for each in traffic), sum(each[1] for each in traffic)
        return Now(self.cpu_seconds(), weight, titles, pid, sent, received)

    def enforce_limits(self) -> bool:
        """End tasks whose time is over; whether one was ended now."""
        ended = [member.limits.enforce() for member in self.members if member.end is None]  # all, not up to the first
        return any(ended)

    def wait_s(self) -> float:
        """How long there is nothing to do but to listen."""
        waits = [member.limits.left_s() for member in self.members if member.end is None]
        searching = any(member.state is TaskState.WAITING_FOR_AGENT for member in self.members)
        return min([SEARCH_TICK_S if searching else TICK_S, *waits])

    def leave(self) -> None:
        """Keep the tasks as they stand for the next start, all at once, as far as that is possible."""
        self._note_time(0.0)
        until = time.monotonic() + LEAVE_DEADLINE_S
        waiting = [running.leave() for running in self.running]
        for left in waiting:
            left(until)

    def end(self, status: Status) -> None:
        """End what still runs."""
        for member in self.members:
            if member.running.state is not TaskState.DONE:
                member.running.kill()
                if status.leave is Leave.ABORT and (lines := member.running.error_tail()):
                    # An aborted job's files go with its slot; of its errors, only our log reaches the project.
                    self._log.say(f"the end of {member.task.stderr_filename}:\n{lines}")


def _saves_itself(task: Task) -> bool:
    """Whether a program writes its own checkpoint where we see it; one in a VM writes it there."""
    return bool(task.checkpoint_filename) and not task.in_vm


class _Limits:
    """Why a task may have to end before its program does: its time limit, or the project's wish."""

    def __init__(self, progress: Progress, task: Task, running: RunningTask, counted: bool) -> None:
        self._progress = progress
        self._time_limit = task.time_limit
        self._running = running
        self._counted = counted
        before = progress.state.state.ran_s.get(str(task.number), 0.0) if counted and task.time_limit else 0.0
        self._start = progress.clock.tick() - before  # of an earlier wrapper
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
