"""One run of a job, from what the slot holds to the finish file."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import VMwrapperError

from .. import __version__
from .boinc.runtime import Leave, Runtime
from .checkpoint import read_checkpoint
from .events import Events
from .exit_codes import SENTENCES, Exit
from .failures import MOST_IN_A_ROW, delay_s, lasting_status, passing_reason
from .job import Job, JobError, Task
from .leftovers import Leftovers
from .log import Log
from .loop import QuitError, TaskLoop
from .progress import Now, Progress
from .services import Services
from .state import StateFile
from .step import Step
from .tasks import RunningTask, TaskError
from .zips import note_initial_files, unzip_inputs, zip_outputs

MakeTask = Callable[[Task], RunningTask]


class ChildFailedError(VMwrapperError):
    """A task's program failed, and with it the job."""


class Wrapper:
    """One run of a job; `build_wrapper` makes it."""

    def __init__(
        self,
        job: Job,
        slot: Path,
        log: Log,
        runtime: Runtime,
        standalone: bool,  # nobody is there to start us again
        events: Events,
        leftovers: Leftovers,
        state: StateFile,
        check_programs: Callable[[], None],
        progress: Progress,
        services: Services,
        loop: TaskLoop,
        make_task: MakeTask,
    ) -> None:
        self.job = job
        self.slot = slot
        self.log = log
        self.runtime = runtime
        self.standalone = standalone
        self.events = events
        self.leftovers = leftovers
        self.state = state
        self.check_programs = check_programs
        self.progress = progress
        self.services = services
        self.loop = loop
        self.make_task = make_task

    def run(self) -> int:
        """The whole job. Returns the exit status."""
        try:
            self._begin()
            self._unzip()
            self.services.start()
            for tasks in self.job.steps(self.progress.checkpoint.tasks_done):
                if self.state.state.end_early:
                    break
                self._run_step(tasks)
            self.services.stop()
            self._zip()
        except QuitError as quit_:
            self.services.stop(keep=self.loop.status.leave is not Leave.ABORT)
            return self._quit(quit_)
        except ChildFailedError as error:
            return self._finish(Exit.CHILD_FAILED, error)
        except JobError as error:
            return self._finish(Exit.INIT_FAILURE, error)
        except Exception as error:
            return self._failed(error)
        finally:
            self.services.stop()
        self.progress.trickles.last(self.progress.work(self.progress.checkpoint.cpu_s))
        return self._finish(Exit.DONE)

    def _begin(self) -> None:
        """See that the job can begin, before anything of it does."""
        self.log.say(f"vmwrapper {__version__}: starting {self.job.path.name}")
        for warning in self.job.warnings:
            self.log.say(f"warning: {warning}")
        if count := self.leftovers.end_all():
            self.log.say(f"ended {count} task(s) that an earlier vmwrapper had left running")
        self.check_programs()
        checkpoint = read_checkpoint(self.slot)
        done = checkpoint.tasks_done if checkpoint else 0
        if checkpoint:
            if done > len(self.job.tasks):
                raise JobError(self.job.path.name, 0, f"has fewer tasks than the checkpoint says are done ({done})")
            self.progress.restore(checkpoint)
            self.log.say(f"going on after {done} of {len(self.job.tasks)} tasks, CPU {checkpoint.cpu_s:.1f} s")
        elif any((self.slot / name).exists() for name in self.job.unzip_input):
            return  # what the first task needs may be in there
        first = self.job.unzip_tasks[:1] if not checkpoint else ()
        for task in first or next(self.job.steps(done), ()):
            if not first and task.number in self.progress.done_of_group():
                continue
            try:
                self.make_task(task).check()
            except TaskError as error:
                raise self.job.error(task, str(error), error.hint) from None

    def _unzip(self) -> None:
        """Bring the inputs into the slot: once, because the first checkpoint says that it is done."""
        if read_checkpoint(self.slot) is not None:
            return
        for name in unzip_inputs(self.slot, self.job.unzip_input, self.loop.follow_client):
            self.log.say(f"unpacked {name}")
        for task in self.job.unzip_tasks:
            cpu_s = self._run([task], counted=False)
            self.progress.checkpoint = self.progress.checkpoint._replace(cpu_s=cpu_s)
        if self.job.zip_output:
            note_initial_files(self.slot)
        self.progress.save(0, self.progress.checkpoint.cpu_s)

    def _run_step(self, tasks: tuple[Task, ...]) -> None:
        done = self.progress.done_of_group()
        left = [task for task in tasks if task.number not in done]
        if len(left) < len(tasks):
            self.log.say(f"{len(tasks) - len(left)} of the {len(tasks)} tasks of this group are done already")
        cpu_s = self._run(left, counted=True)
        self.progress.save(
            self.progress.checkpoint.tasks_done + len(tasks), cpu_s, group_done=(), commands=(), ran_s={}
        )
        self.progress.report(Now(cpu_s), self.loop.status)
        later = {task.virtualmachine for task in self.job.tasks[self.progress.checkpoint.tasks_done :]}
        for name in dict.fromkeys(task.virtualmachine for task in tasks if task.in_vm):
            if name not in later:
                self._release(name)

    def _run(self, tasks: Sequence[Task], counted: bool) -> float:
        """Run tasks at once; returns the job's CPU time. Raises ChildFailedError when a program failed."""
        running = [(task, self.make_task(task)) for task in tasks]
        step = Step(running, self.slot, self.log, self.progress, self.services, counted)
        self.loop.run(step)
        failed = step.failed
        if failed is None or failed.end is None:
            return step.cpu_seconds(now=True)
        self.progress.checkpoint = self.progress.checkpoint._replace(cpu_s=step.cpu_seconds(now=True))
        lines = failed.running.error_tail()
        more = f"; the end of {failed.task.stderr_filename}:\n{lines}" if lines else ""
        raise ChildFailedError(f"{failed.task.title} {failed.end.sentence}{more}")

    def _release(self, name: str) -> None:
        """End a VM that no later task uses; the next task need not wait for that."""
        client = self.services.agent.client() if self.services.agent else None
        if client is not None:
            client.start("stop_vm", {"vm": name}, on_end=lambda vm, _error: self._say_what_it_used(vm or {}))

    def _say_what_it_used(self, vm: Mapping[str, Any]) -> None:
        if vm.get("wall_s"):
            used = f"CPU {vm.get('cpu_s', 0):.1f} s on this computer in {vm['wall_s']:.1f} s"
            self.log.say(f"virtual machine {vm.get('vm')}: {used}, {vm.get('paused_s', 0):.1f} s of them paused")

    def _zip(self) -> None:
        if self.job.zip_output:
            count = zip_outputs(self.slot, self.job.zip_output, self.loop.follow_client)
            self.log.say(f"packed {count} file(s) into {self.job.zip_output.zipfilename}")

    def _quit(self, quit_: QuitError) -> int:
        """Leave without a finish file: the client starts us again, or has aborted the job and looks at our log."""
        self.log.say(f"ending because of {quit_}; the next start goes on after the last checkpoint")
        self.log.sync()
        return Exit.DONE

    def _failed(self, error: Exception) -> int:
        """What was nobody's fault: wait and try again if that may help, and if somebody is there to start us again."""
        reason, count = passing_reason(error), self.state.state.temporary_exits + 1
        if reason and not self.standalone and count <= MOST_IN_A_ROW:
            delay = delay_s(count)
            self.log.say(f"{reason}; trying again in {delay} s (failure {count} in a row, of at most {MOST_IN_A_ROW})")
            self.services.stop(keep=True)
            try:
                self.state.change(temporary_exits=count)
                return self.runtime.temporary_exit(delay, reason)
            except OSError as problem:  # the disk may be what is full
                self.log.say(f"that cannot be written down ({problem.strerror}), so the wait is here")
                return self._wait_here(delay)
        if lasting_status(error) is Exit.UNKNOWN:
            self.log.say("".join(traceback.format_exception(error)))
        return self._finish(lasting_status(error), error)

    def _wait_here(self, delay_s: float) -> int:
        """Without a word the client would start us again at once, a hundred times, and then give up."""
        until = time.monotonic() + delay_s
        with contextlib.suppress(QuitError):
            while (left := until - time.monotonic()) > 0:
                self.loop.follow_client()
                self.events.wait(min(left, 1.0))
        return Exit.DONE

    def _finish(self, status: int, error: Exception | None = None) -> int:
        self.services.stop()  # the finish file is the last thing that a client may see of us
        try:
            return finish(self.runtime, self.log, status, error)
        except OSError as problem:  # all is done, and must not be lost because the disk is full just now
            return self._failed(problem)


def finish(runtime: Runtime, log: Log, status: int, error: Exception | None = None) -> int:
    """Say how it ended, and write the finish file. Raises OSError when a good end cannot be written down."""
    if error is not None:
        log.say(error.explain() if isinstance(error, VMwrapperError) else str(error))
    log.say(f"finished with {status}: {SENTENCES[Exit(status)]}")
    log.sync()
    try:
        return int(runtime.finish(status, str(error) if error else ""))
    except OSError as problem:
        if not status:
            raise
        log.say(f"the finish file cannot be written: {problem}")
        return int(status)  # which says enough
