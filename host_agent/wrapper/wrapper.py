"""One run of a job, from what the slot holds to the finish file."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import attrs

from common.errors import VMwrapperError

from .. import __version__
from .boinc.runtime import Runtime
from .checkpoint import read_checkpoint
from .events import Events
from .exit_codes import SENTENCES, Exit
from .failures import MOST_IN_A_ROW, delay_s, lasting_status, passing_reason
from .job import Job, JobError, Task
from .leftovers import Leftovers
from .log import Log
from .loop import QuitError, TaskLoop
from .progress import Progress
from .services import Services
from .state import StateFile
from .tasks import RunningTask, TaskError
from .zips import note_initial_files, unzip_inputs, zip_outputs

MakeTask = Callable[[Task], RunningTask]


class ChildFailedError(VMwrapperError):
    """A task's program failed, and with it the job."""


@attrs.define(eq=False)
class Wrapper:
    """One run of a job; `build_wrapper` makes it."""

    job: Job
    slot: Path
    log: Log
    runtime: Runtime
    standalone: bool  # nobody is there to start us again
    events: Events
    leftovers: Leftovers
    state: StateFile
    check_programs: Callable[[], None]
    progress: Progress
    services: Services
    loop: TaskLoop
    make_task: MakeTask

    def run(self) -> int:
        """The whole job. Returns the exit status."""
        try:
            self._begin()
            self._unzip()
            self.services.start()
            for index in range(self.progress.checkpoint.tasks_done, len(self.job.tasks)):
                if self.state.state.end_early:
                    break
                self._run_task(index)
            self.services.stop()
            self._zip()
        except QuitError as quit_:
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
        first = (*(self.job.unzip_tasks if not checkpoint else ()), *self.job.tasks[done:])
        if first:
            try:
                self.make_task(first[0]).check()
            except TaskError as error:
                raise self.job.error(first[0], str(error), error.hint) from None

    def _unzip(self) -> None:
        """Bring the inputs into the slot: once, because the first checkpoint says that it is done."""
        if read_checkpoint(self.slot) is not None:
            return
        for name in unzip_inputs(self.slot, self.job.unzip_input, self.loop.follow_client):
            self.log.say(f"unpacked {name}")
        for task in self.job.unzip_tasks:
            self._run_one(task, counted=False)
        if self.job.zip_output:
            note_initial_files(self.slot)
        self.progress.save(0, self.progress.checkpoint.cpu_s)

    def _run_task(self, index: int) -> None:
        task = self.job.tasks[index]
        self._run_one(task, counted=True)
        self.progress.save(index + 1, self.progress.checkpoint.cpu_s)
        self.progress.report(None, self.progress.checkpoint.cpu_s, 0.0, self.loop.status)
        later = self.job.tasks[index + 1 :]
        if task.in_vm and all(task.virtualmachine != other.virtualmachine for other in later):
            self._release(task.virtualmachine)

    def _run_one(self, task: Task, counted: bool) -> None:
        running = self.make_task(task)
        end, cpu_s = self.loop.run(task, running, counted)
        before = self.progress.checkpoint
        self.progress.checkpoint = attrs.evolve(before, cpu_s=before.cpu_s + cpu_s)
        if not end.ok:
            lines = running.error_tail()
            more = f"; the end of {task.stderr_filename}:\n{lines}" if lines else ""
            raise ChildFailedError(f"{task.title} {end.sentence}{more}")

    def _release(self, name: str) -> None:
        """End a VM that no later task uses; the next task need not wait for that."""
        client = self.services.agent.client() if self.services.agent else None
        if client is not None:
            client.start("stop_vm", {"vm": name})

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
            self.services.stop()
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
