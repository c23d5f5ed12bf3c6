"""A task in a virtual machine: VM up, files in, program run, files out; all through the control interface.

    READY → WAITING_FOR_AGENT → STARTING_VM → COPYING_IN → RUNNING → COPYING_OUT → DONE

Every state is left by an answer of the host agent; an error in any of them ends the task. While the program runs, what
it does is kept now and then (`guest_checkpoints.py`). A VM that went back to a checkpoint knows nothing of what was
done in it since: the host agent then answers `undone`, and the task begins at the top.
When the connection is lost and the agent comes back, or when the wrapper itself was started anew, it begins at the top
again: the state file says which VM and which command were its own, and what is done already is not done twice.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import attrs

from common.errors import VMwrapperError

from ..control_client import ControlClient
from .guest_calls import UNDONE, number
from .guest_checkpoints import vm_arguments
from .guest_files import basename, check_files, guest_inputs
from .guest_steps import IN_VM, START_DEADLINE_S, GuestSteps, Step
from .log import tail
from .resolve import command_words, environment, in_guest, resolve_path
from .state import CommandRecord
from .tasks import ENDED_EARLY, TIME_LIMIT, Left, TaskEnd, TaskState
from .vm_wishes import VmLimits

FRACTION_FILE = "fraction_done"  # in the guest's home, when the job names no other
LOOK_AGAIN_S = 1.0  # at a VM whose agent has not come back yet


@attrs.define(eq=False)
class GuestTask(GuestSteps):
    """A `RunningTask` in a VM."""

    def check(self) -> None:
        """Whether the files to copy are there. Raises TaskError; starts nothing."""
        check_files(self.task, self.slot)

    def run(self) -> None:
        self.check()
        if self.task.stderr_filename:
            path = resolve_path(self.slot, self.task.stderr_filename)
            self._stderr_start = path.stat().st_size if path.exists() else 0
        self._enter(TaskState.WAITING_FOR_AGENT)

    def poll(self) -> TaskEnd | None:
        if self.state in (TaskState.READY, TaskState.DONE):
            return self._end
        client = self.agent.client()  # first: it knows best why a connection ended
        if self._error is not None:
            raise self._error
        if client is not None and client is not self._client:
            self._begin(client)
        if self.state in IN_VM and (wanted := self.wishes.of(self.task.network)) != self._told:
            self._told = wanted
            self._tell("limit_vm", {**self._vm(), **wanted._asdict()})
        self._advance()
        if self._error is not None:
            raise self._error
        return self._end

    def stop(self) -> None:
        if not self._suspended:
            self._suspended = True
            self._vm_call("pause_vm")

    def resume(self) -> None:
        if self._suspended:
            self._suspended = False
            self._vm_call("resume_vm")

    def expire(self, why: str = TIME_LIMIT) -> None:
        self._on_purpose = why
        if self.state is TaskState.RUNNING:
            self._signal("KILL")
        elif self.state is not TaskState.DONE:
            self._finish(TaskEnd(on_purpose=why))

    def ask_to_end(self) -> None:
        if self.state is TaskState.RUNNING:
            self._on_purpose = ENDED_EARLY
            self._signal("TERM")
        elif self.state is not TaskState.COPYING_OUT:
            self.expire(ENDED_EARLY)

    def leave(self) -> Left:
        """Save the VM with the program in it. The next wrapper finds both by what the state file says."""
        before, client = self.state, self._client
        if client is None or not self.agent.state_directory or before not in IN_VM:
            return lambda _until: None
        self._is_left = True
        self.state = TaskState.DONE  # whatever the agent still tells of the task, the next wrapper will ask for
        saved = client.begin("save_vm", self._vm())

        def wait(until: float) -> None:
            try:
                saved.wait(until)
            except VMwrapperError as error:
                self.log.say(f"{self.task.title}: its virtual machine could not be saved: {error}")
                self.state = before
            else:
                self.log.say(f"{self.task.title}: its virtual machine is saved, and goes on at the next start")

        return wait

    def kill(self) -> None:
        if self.state is TaskState.RUNNING:
            self._signal("KILL")
        self._finish(self._end or TaskEnd(signal="SIGKILL"))

    def cpu_seconds(self, now: bool = False) -> float:
        return self._cpu_s

    def kept(self, wanted: bool) -> float | None:
        kept = self._checkpoints.kept()
        if kept is not None:
            self.agent.gets_on()
            if self._checkpoints.by_file and not self._note_copy():
                kept = None
        # After that: it may write over the copy.
        client, runs = self._client, self.state is TaskState.RUNNING and self._started and not self._suspended
        if wanted and runs and client is not None and not client.closed:
            self._checkpoints.begin(client, self._cpu_s)
        return kept

    def _note_copy(self) -> bool:
        """Write down what belongs to a new copy of the program's own checkpoint, and let it take its place."""
        record = self._record()
        if record is None:
            return False
        try:
            lengths = self._output.lengths()
            self.saved.keep_command(record._replace(output_copied=lengths, copied=self._checkpoints.copy))
            self._settle_copy()
        except OSError as error:
            self._checkpoints.failed(f"it cannot be written down: {error.strerror}")
            return False
        return True

    def _settle_copy(self) -> None:
        """A copy of the program's own checkpoint that is written down takes the last one's place."""
        record = self._record()
        if record is not None and record.output_copied:
            self._checkpoints.take(record.copied)
            self.saved.keep_command(record._replace(output_kept=record.output_copied, output_copied={}, copied=""))

    def fraction(self) -> float:
        return 1.0 if self.state is TaskState.DONE else self._fraction

    def other_pid(self) -> int:
        return self._vm_pid

    def traffic(self) -> tuple[float, float]:
        return self._traffic

    def error_tail(self) -> str:
        name = self.task.stderr_filename
        return tail(resolve_path(self.slot, name), self._stderr_start) if name else ""

    # Steps, in the order in which they happen

    def _begin(self, client: ControlClient) -> None:
        """Ask a host agent that we have not asked before."""
        self._client = client
        self._waiting = False
        self._at_the_top()

    def _look_for_vm(self, client: ControlClient) -> None:
        self._ask(client, "vms", {}, self._vms_listed)

    def _vms_listed(self, result: Mapping[str, Any]) -> None:
        for vm in result.get("vms") or ():
            if vm.get("vm") != self.task.virtualmachine:
                continue
            if vm.get("instance") == self._useless:
                self._steps.append(partial(self._remove_vm, self._useless))
                break
            if vm.get("state") in ("running", "paused", "saved"):
                self._found(vm)
                return
            if vm.get("state") == "starting" and vm.get("agent") != "waiting":  # on its way back to a checkpoint
                self._look_again()
                return
            if vm.get("state") in ("crashed", "stopped"):
                self._steps.append(partial(self._remove_vm, vm.get("instance")))
        self._steps.append(self._start_vm)

    def _remove_vm(self, instance: object, client: ControlClient) -> None:
        """That one, not one that another task of the group has made meanwhile."""
        self._ask(client, "stop_vm", {**self._vm(), "instance": instance})

    def _found(self, vm: Mapping[str, Any]) -> None:
        if vm.get("state") != "running":
            self._resumed = str(vm.get("instance") or "")
            self._steps.append(lambda client: self._ask(client, "resume_vm", self._vm(), self._vm_ready))
        elif vm.get("agent") == "present":
            self._vm_ready(vm)
        elif vm.get("agent") == "gone":
            self._steps += [partial(self._remove_vm, vm.get("instance")), self._start_vm]
        else:  # the host agent was restarted, and the guest is not back yet
            self._look_again()

    def _look_again(self) -> None:
        if time.monotonic() < self._patience_until:
            self._not_before = time.monotonic() + LOOK_AGAIN_S
            self._steps.append(self._look_for_vm)
        else:
            self._fail(f"the guest agent did not come back in {START_DEADLINE_S:g} s", passing=True)

    def _start_vm(self, client: ControlClient) -> None:
        task = self.task
        image = task.image
        if image and resolve_path(self.slot, image).exists():
            image = str(resolve_path(self.slot, image).resolve())
        args = {
            **self._vm(),
            "image": image,
            "memory_mb": task.memory_mb,
            "cpus": task.cpus,
            "network": task.network,
            "directory": str(self.slot),
            "deadline_s": START_DEADLINE_S,
        }
        self._ask(client, "start_vm", args, self._vm_ready, self._vm_update)

    def _vm_update(self, name: str, data: Mapping[str, Any]) -> None:
        if name == "state":
            reason = f": {data['reason']}" if data.get("reason") else ""
            self.log.say(f"virtual machine {self.task.virtualmachine} is {data.get('state')}{reason}")

    def _vm_ready(self, vm: Mapping[str, Any]) -> None:
        if self._suspended:  # it came up after the client had asked for quiet
            self._tell("pause_vm", self._vm())
        self._vm_pid, self._epoch = int(number(vm.get("pid"))), int(number(vm.get("epoch")))
        self._told = VmLimits()
        instance = str(vm.get("instance") or "")
        if self._checkpoints.by_file:
            self._settle_copy()
            self._checkpoints.forget_copies()
        record = self._record()
        if record is not None and record.asked and record.instance == instance:
            self.log.say(f"{self.task.title}: going on with command {record.command}")
            self._enter(TaskState.RUNNING, [self._run_command])
            return
        starts = dict(record.output_starts) if record is not None else self._output.sizes()
        resumes = record is not None and bool(record.output_kept) and self._checkpoints.file.exists()
        kept = dict(record.output_kept) if record is not None and resumes else {}
        self._output.reset(starts, kept)
        command = f"c-{os.urandom(8).hex()}"  # as `secrets` makes them, which costs 4 MB of memory
        self.saved.keep_command(
            CommandRecord(
                self.task.number,
                self.task.virtualmachine,
                instance,
                command,
                agent=self.agent.state_directory,
                output_starts=starts,
                output_kept=kept,
                cpu_s=self.counted_s,
                cpu_before_s=self.counted_s if resumes else 0.0,
            )
        )
        inputs = guest_inputs(self.task)
        if resumes:
            name = self.task.checkpoint_filename
            self.log.say(f"{self.task.title}: going on from its own checkpoint, {name}")
            inputs = [*(each for each in inputs if each[1] != name), (name, name)]
        self._enter(TaskState.COPYING_IN, [partial(self._put, name, there) for name, there in inputs])
        self._steps.append(self._run_command)

    def _put(self, name: str, destination: str, client: ControlClient) -> None:
        source = str(resolve_path(self.slot, name).resolve())
        self._ask(client, "put", {**self._vm_now(), "source": source, "destination": destination}, what=repr(name))

    def _run_command(self, client: ControlClient) -> None:
        self._enter(TaskState.RUNNING)
        task = self.task
        record = self._record()
        assert record is not None
        # Before the host agent hears of the id, so that no crash leaves a command that we would start a second time.
        self.saved.keep_command(record._replace(asked=True))
        program = f"./{basename(task.application)}" if task.copy_app_to_vm else task.application
        args = {
            **self._vm_now(),
            "argv": [program, *command_words(task, self.slot, self.macros, self.extra_words)],
            "command": record.command,
            "env": environment(task, self.macros),
            "cwd": in_guest(self.macros).expand(task.exec_dir),
            "stdin": task.stdin_filename,
            "stdout": str(self._output.path("stdout")),
            "stderr": str(self._output.path("stderr")),
            "stream": False,
            "fraction_file": task.fraction_done_filename or FRACTION_FILE,
            "deadline_s": 0,
        }
        self._ask(client, "run", args, self._run_ended, self._run_update)

    def _run_update(self, name: str, data: Mapping[str, Any]) -> None:
        if name == "started":
            self._started = True
            if self._on_purpose:
                self._signal("KILL")
        elif name == "fraction":
            self._fraction = min(1.0, max(0.0, number(data.get("fraction"))))
        elif name == "usage":
            self._cpu_s = max(self._cpu_s, self._before_s + number(data.get("cpu_s")))
            self._vm_pid = int(number(data.get("vm_pid"))) or self._vm_pid
            self._traffic = (number(data.get("sent_bytes")), number(data.get("received_bytes")))
        elif name == "rolled_back":
            self.log.say(f"{self.task.title}: its virtual machine failed, and went back to its last checkpoint")
            self._cpu_s, self._fraction = self.counted_s, 0.0

    @property
    def _before_s(self) -> float:
        """CPU time of earlier runs that the program has gone on from."""
        record = self._record()
        return record.cpu_before_s if record is not None else 0.0

    def _run_ended(self, result: Mapping[str, Any]) -> None:
        self._started = False
        used = self._before_s + number(result.get("user_s")) + number(result.get("system_s"))
        self._cpu_s = max(self._cpu_s, used)
        outcome, reason = result.get("outcome"), str(result.get("reason") or "")
        if outcome == "lost" and reason.startswith(f"{UNDONE}:"):
            self._forget_command()
            self._at_the_top()
            return
        if outcome == "lost":
            self._vm_failed(f"what became of its program is not known: {reason}")
            return
        if outcome == "exited":
            end = TaskEnd(int(number(result.get("exit_code"))), on_purpose=self._on_purpose)
        elif outcome == "signalled":
            name = str(result.get("signal") or "a signal")
            name = name if name.startswith(("SIG", "a ")) else f"SIG{name}"
            end = TaskEnd(signal=name, on_purpose=self._on_purpose)
            if reason:
                self.log.say(f"{self.task.title}: {reason}")
        elif outcome == "deadline":
            end = TaskEnd(on_purpose=TIME_LIMIT)
        else:
            end = TaskEnd(exit_code=127, reason=reason or str(outcome))
        if not end.ok:
            self._finish(end)
            return
        steps: list[Step] = [partial(self._get, name) for name in self.task.copy_files_from_vm]
        if self.vm_goes_on and not self.task.no_checkpoints:
            steps.append(self._keep_for_the_next)
        self._enter(TaskState.COPYING_OUT, [*steps, lambda _client: self._finish(end)])

    def _get(self, name: str, client: ControlClient) -> None:
        destination = str(resolve_path(self.slot, name))
        args = {**self._vm_now(), "source": name, "destination": destination}
        self._ask(client, "get", args, what=repr(name))

    def _keep_for_the_next(self, client: ControlClient) -> None:
        """So that a VM that fails later does not go back to the middle of this task, which is done then."""
        self._ask(client, "checkpoint_vm", {**self._vm_now(), **vm_arguments(self.task, self._cpu_s)})
