"""`vmwrapper`: what the BOINC client runs. It reads job.xml and runs its tasks, on the host or in a VM.

A job that stays on the host imports neither Twisted nor a hypervisor's library: those live in the host agent,
a process of its own (`agent_process.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from common.errors import VMwrapperError

from .. import __version__
from .boinc import connect
from .boinc.runtime import SLOT_BUSY_DELAY_S, Runtime, SlotBusyError
from .checkpoint import Checkpoint, read_checkpoint
from .events import Events
from .exit_codes import SENTENCES, Exit
from .host_task import HostTask, Watch
from .job import Job, JobError, Task, load_job
from .leftovers import Leftovers
from .log import Log
from .loop import Progress, QuitError, TaskLoop
from .options import HELP, Options, UsageError, parse_options
from .resolve import Macros, resolve_path
from .services import Services
from .tasks import RunningTask, TaskEnd, TaskError
from .zips import note_initial_files, unzip_inputs, zip_outputs

if TYPE_CHECKING:  # a job that stays on the host does without
    from .agent_process import AgentLink

MakeTask = Callable[[Task], RunningTask]


class ChildFailedError(VMwrapperError):
    """A task's program failed, and with it the job."""

    def __init__(self, sentence: str, end: TaskEnd) -> None:
        super().__init__(sentence)
        self.end = end


@attrs.define(eq=False)
class Wrapper:
    """One run of a job; `build_wrapper` makes it."""

    job: Job
    slot: Path
    options: Options
    log: Log
    runtime: Runtime
    events: Events
    leftovers: Leftovers
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
                self._run_task(index)
            self.services.stop()
            self._zip()
        except QuitError as quit_:
            self.log.say(f"ending because of {quit_}; the next start goes on after the last checkpoint")
            return Exit.DONE
        except ChildFailedError as error:
            own = error.end.exit_code or Exit.CHILD_FAILED
            return self._finish(own if self.options.passthrough_child else Exit.CHILD_FAILED, error)
        except JobError as error:
            return self._finish(Exit.INIT_FAILURE, error)
        except (VMwrapperError, OSError) as error:
            return self._finish(Exit.SUB_TASK_FAILURE, error)
        finally:
            self.services.stop()
        return self._finish(Exit.DONE)

    def _begin(self) -> None:
        """See that the job can begin, before anything of it does."""
        self.log.say(f"vmwrapper {__version__}: starting {self.job.path.name}")
        for warning in self.job.warnings:
            self.log.say(f"warning: {warning}")
        if count := self.leftovers.end_all():
            self.log.say(f"ended {count} task(s) that an earlier vmwrapper had left running")
        checkpoint = read_checkpoint(self.slot)
        done = checkpoint.tasks_done if checkpoint else 0
        if checkpoint:
            if done > len(self.job.tasks):
                raise JobError(self.job.path.name, 0, f"has fewer tasks than the checkpoint says are done ({done})")
            self.progress.restore(checkpoint)
            self.log.say(f"going on after {done} of {len(self.job.tasks)} tasks, CPU {checkpoint.cpu_s:.1f} s")
        archives = any((self.slot / name).exists() for name in self.job.unzip_input)
        first = (*(self.job.unzip_tasks if not checkpoint else ()), *self.job.tasks[done:])
        if first and not archives:
            task = first[0]
            try:
                self.make_task(task).check()
            except TaskError as error:
                raise self.job.error(task, str(error), error.hint) from None

    def _unzip(self) -> None:
        """Bring the inputs into the slot: once, because the first checkpoint says that it is done."""
        for name in unzip_inputs(self.slot, self.job.unzip_input):
            self.log.say(f"unpacked {name}")
        if read_checkpoint(self.slot) is not None:
            return
        for task in self.job.unzip_tasks:
            self._run_one(task, counted=False)
        if self.job.zip_output:
            note_initial_files(self.slot)
        self.progress.save(0, self.progress.checkpoint.cpu_s)

    def _run_task(self, index: int) -> None:
        task = self.job.tasks[index]
        self._run_one(task, counted=True)
        self.progress.save(index + 1, self.progress.checkpoint.cpu_s)
        self.progress.report(None, self.progress.checkpoint.cpu_s, 0.0)
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
            raise ChildFailedError(f"{task.title} {end.sentence}{more}", end)

    def _release(self, name: str) -> None:
        """End a VM that no later task uses; the next task need not wait for that."""
        client = self.services.agent.client() if self.services.agent else None
        if client is not None:
            client.start("stop_vm", {"vm": name})

    def _zip(self) -> None:
        if self.job.zip_output:
            count = zip_outputs(self.slot, self.job.zip_output)
            self.log.say(f"packed {count} file(s) into {self.job.zip_output.zipfilename}")

    def _finish(self, status: int, error: Exception | None = None) -> int:
        self.services.stop()  # the finish file is the last thing that a client may see of us
        return finish(self.runtime, self.log, status, error)


def build_wrapper(options: Options, slot: Path, agent_argv: Sequence[str] | None = None) -> Wrapper:
    """Make every part and connect it: the map of the program. Raises JobError; nothing is started."""
    log = Log(slot)
    runtime = connect(slot, log.say)
    given = runtime.init()
    job = load_job(resolve_path(slot, str(options.job)))
    events = Events()
    leftovers = Leftovers(slot)
    watch = Watch(readable=events.watch_until, started=leftovers.add, ended=leftovers.remove)
    device = given.gpu_device if given.gpu_device >= 0 else options.device
    macros = Macros(given.project_dir, options.nthreads, device, str(slot))

    def host_task(task: Task, service: bool = False) -> HostTask:
        return HostTask(task, slot, macros, watch, options.words, given.process_priority, service)

    def make_task(task: Task) -> RunningTask:
        if not task.in_vm:
            return host_task(task)
        from .guest_task import GuestTask

        assert agent is not None
        return GuestTask(task, slot, macros, agent, log.say, options.words)

    checkpoint = read_checkpoint(slot) or Checkpoint()
    needs_vm = any(task.in_vm for task in job.tasks[checkpoint.tasks_done :])
    daemons = [host_task(task, service=True) for task in job.daemons]
    managers = [host_task(task, service=True) for task in job.manage_tasks] if needs_vm else []
    agent: AgentLink | None = None
    if needs_vm:
        from .agent_process import choose_agent

        agent = choose_agent(job, slot, managers, events, log.say, agent_argv)
    services = Services(daemons, managers, agent, events, log.say)
    progress = Progress(job, slot, runtime, log, options.trickle_s)
    loop = TaskLoop(slot, runtime, events, log, progress, services)
    return Wrapper(
        job, slot, options, log, runtime, events, leftovers, progress, services, loop, make_task
    )  # fmt: skip


def finish(runtime: Runtime, log: Log, status: int, error: Exception | None = None) -> int:
    """Say how it ended, and write the finish file."""
    if error is not None:
        log.say(error.explain() if isinstance(error, VMwrapperError) else str(error))
    known = {int(code): sentence for code, sentence in SENTENCES.items()}
    log.say(f"finished with {status}: {known.get(status, 'the exit status of a task')}")
    return int(runtime.finish(status, str(error) if error else ""))


def main(words: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    slot = Path.cwd()
    try:
        options = parse_options(sys.argv[1:] if words is None else words)
    except UsageError as error:
        return finish(connect(slot), Log(slot), Exit.INIT_FAILURE, error)
    if options.help:
        sys.stdout.write(HELP)
        return 0
    if options.version:
        sys.stdout.write(f"vmwrapper {__version__}\n")
        return 0
    try:
        wrapper = build_wrapper(options, slot)
    except SlotBusyError as error:
        Log(slot).say(error.explain())
        return connect(slot).temporary_exit(SLOT_BUSY_DELAY_S, str(error))
    except VMwrapperError as error:
        return finish(connect(slot), Log(slot), Exit.INIT_FAILURE, error)
    try:
        return wrapper.run()
    finally:
        wrapper.runtime.close()
        wrapper.events.close()


if __name__ == "__main__":
    sys.exit(main())
