"""`vmwrapper`: what the BOINC client runs. It reads job.xml and runs its tasks, on the host or in a VM.

A job that stays on the host imports neither Twisted nor a hypervisor's library: those live in the host agent,
a process of its own (`agent_process.py`). The XML library is gone too when the job begins (`apart.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import VMwrapperError

from .. import __version__
from .apart import load_job_apart
from .boinc import connect
from .boinc.runtime import SLOT_BUSY_DELAY_S, SlotBusyError
from .checkpoint import Checkpoint, read_checkpoint
from .events import Events
from .exit_codes import Exit
from .host_task import HostTask, Watch
from .job import Task
from .leftovers import Leftovers
from .log import Log
from .loop import TaskLoop
from .options import HELP, Options, UsageError, parse_options
from .progress import Progress
from .resolve import Macros, resolve_path
from .services import Services
from .signed import SignedFiles, check_programs
from .sporadic import SporadicFiles
from .state import StateFile
from .tasks import RunningTask
from .trickles import Trickles
from .vm_wishes import VmWishes
from .wrapper import Wrapper, finish

if TYPE_CHECKING:  # a job that stays on the host does without
    from .agent_process import AgentLink
    from .guest_checkpoints import Paces


def build_wrapper(options: Options, slot: Path, agent_argv: Sequence[str] | None = None) -> Wrapper:
    """Make every part and connect it: the map of the program. Raises JobError; nothing is started."""
    log = Log(slot)
    runtime = connect(slot, log.say)
    given = runtime.init()
    job = load_job_apart(resolve_path(slot, str(options.job)))
    state = StateFile(slot)
    events = Events()
    leftovers = Leftovers(slot)
    watch = Watch(readable=events.watch_until, started=leftovers.add, ended=leftovers.remove, say=log.say)
    device = given.gpu_device if given.gpu_device >= 0 else options.device
    macros = Macros(given.project_dir, options.nthreads, device, str(slot))
    priority = None if given.no_priority_change else given.process_priority

    wishes = VmWishes()
    wishes.follow(given)

    def host_task(task: Task, service: bool = False) -> HostTask:
        return HostTask(task, slot, macros, watch, options.child_words, priority, service, options.use_tstp)

    def make_task(task: Task) -> RunningTask:
        if not task.in_vm:
            return host_task(task)
        from .guest_checkpoints import Paces
        from .guest_task import GuestTask

        assert agent is not None
        if not paces:
            paces.append(Paces(job.checkpoint_period))
        later = any(each.virtualmachine == task.virtualmachine for each in job.tasks[task.number :])
        pace = paces[0].of(task)
        return GuestTask(task, slot, macros, agent, state, log, pace, options.child_words, wishes, later)

    paces: list[Paces] = []

    checkpoint = read_checkpoint(slot) or Checkpoint()
    needs_vm = not state.state.end_early and any(task.in_vm for task in job.tasks[checkpoint.tasks_done :])
    daemons = [host_task(task, service=True) for task in job.daemons]
    managers = [host_task(task, service=True) for task in job.manage_tasks] if needs_vm else []
    agent: AgentLink | None = None
    if needs_vm:
        from .agent_process import choose_agent

        page = None if given.standalone else runtime.web_graphics_url
        agent = choose_agent(job, slot, managers, events, log.say, agent_argv, page)
    services = Services(daemons, managers, agent, events, log.say)
    trickles = Trickles(runtime, state, options.trickle_s, given.host.fpops, log.say)
    progress = Progress(job, slot, runtime, log, state, trickles)
    sporadic = SporadicFiles(slot, runtime) if options.sporadic else None
    loop = TaskLoop(slot, runtime, events, log, progress, services, wishes, sporadic)
    return Wrapper(
        job=job,
        slot=slot,
        log=log,
        runtime=runtime,
        standalone=given.standalone,
        events=events,
        leftovers=leftovers,
        state=state,
        check_programs=lambda: check_programs(job, SignedFiles.of(slot, given), macros),
        progress=progress,
        services=services,
        loop=loop,
        make_task=make_task,
    )


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
