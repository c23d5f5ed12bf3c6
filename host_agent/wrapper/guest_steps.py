"""How a task in a VM gets on: one question at the host agent after another, and what becomes of it when one fails.

The steps themselves, and their order, are in `guest_task.py`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs

from common.errors import VMwrapperError
from common.files import failed_console

from ..control_client import ControlClient, ControlError
from .agent_process import AgentLink
from .failures import passing_errno
from .guest_calls import POWERED_OFF, UNDONE, VM_EXISTS, VM_FAILED, is_passing, sentence
from .guest_checkpoints import GuestCheckpoints, Pace
from .guest_output import CommandOutput
from .job import Task
from .log import Log
from .resolve import Macros
from .state import CommandRecord, StateFile
from .tasks import TaskEnd, TaskError, TaskState
from .vm_wishes import VmLimits, VmWishes

START_DEADLINE_S = 180.0  # an emulated boot takes seven seconds on an idle computer; many may be busy on this one
CONSOLE_BYTES = 4096  # of a failed VM's console, in our log

Step = Callable[[ControlClient], None]
IN_VM = (TaskState.COPYING_IN, TaskState.RUNNING, TaskState.COPYING_OUT)


@attrs.define(eq=False)
class GuestSteps:
    """What a task in a VM is made of, and how its steps are taken."""

    task: Task
    slot: Path
    macros: Macros
    agent: AgentLink
    saved: StateFile
    log: Log
    pace: Pace
    extra_words: tuple[str, ...] = ()
    wishes: VmWishes = attrs.field(factory=VmWishes)
    vm_goes_on: bool = False  # a later task runs in the same VM
    state: TaskState = TaskState.READY
    _output: CommandOutput = attrs.field(init=False)
    _checkpoints: GuestCheckpoints = attrs.field(init=False)
    _client: ControlClient | None = None  # whom the steps ask; another one begins at the top
    _steps: list[Step] = attrs.field(factory=list)  # what is left to do in this state
    _waiting: bool = False  # an answer is due; the next step must wait for it
    _not_before: float = 0.0  # when the next step may be taken
    _patience_until: float = 0.0  # how long the VM's agent may take to come back
    _suspended: bool = False
    _on_purpose: str = ""
    _started: bool = False  # the program runs, as far as we know
    _vm_pid: int = 0
    _told: VmLimits = attrs.field(factory=VmLimits)  # what the VM is held to
    _epoch: int = 0  # of the VM, as the steps know it
    _cpu_s: float = 0.0
    _fraction: float = 0.0
    _traffic: tuple[float, float] = (0.0, 0.0)
    _stderr_start: int = 0
    _is_left: bool = False  # the next wrapper goes on with it
    _retried: bool = False  # a VM failed, and the task has begun anew in another one
    _switched_off: bool = False  # by its guest, that VM
    _resumed: str = ""  # the instance of the VM that was last to go on
    _useless: str = ""  # one that cannot
    _end: TaskEnd | None = None
    _error: TaskError | None = None

    def __attrs_post_init__(self) -> None:
        self._output = CommandOutput(self.task, self.slot)
        self._checkpoints = GuestCheckpoints(self.task, self.slot, self.pace, self.log.say)
        self._cpu_s = self.counted_s

    @property
    def counted_s(self) -> float:
        record = self._record()
        return record.cpu_s if record is not None else 0.0

    def _look_for_vm(self, client: ControlClient) -> None:
        """The first step: from what is found there follow all others."""
        raise NotImplementedError

    # What is written down

    def _record(self) -> CommandRecord | None:
        """What the state file says of this task, if anything."""
        return self.saved.command_of(self.task.number)

    def _forget_command(self) -> None:
        """Its id stands for a run that nobody knows the end of; the next attempt needs another."""
        record = self._record()
        if record is not None:
            self.saved.keep_command(record._replace(asked=False, command=""))

    # How steps are taken

    def _enter(self, state: TaskState, steps: list[Step] | None = None) -> None:
        self.state = state
        self._steps = steps or []

    def _advance(self) -> None:
        """Take the next steps, unless an answer is due, the client wants quiet, or there is no agent just now."""
        while self._steps and not (self._waiting or self._suspended or self._error):
            client = self._client
            if client is None or client.closed or time.monotonic() < self._not_before:
                return
            self._steps.pop(0)(client)

    def _ask(
        self,
        client: ControlClient,
        call: str,
        args: Mapping[str, Any],
        then: Callable[[Mapping[str, Any]], None] | None = None,
        on_update: Callable[[str, dict[str, Any]], None] | None = None,
        what: str = "",
    ) -> None:
        def ended(result: Mapping[str, Any] | None, error: ControlError | None) -> None:
            if self.state is TaskState.DONE or client is not self._client:
                return
            self._waiting = False
            if error is not None:
                self._refused(call, what, error)
                return
            try:
                if then is not None:
                    then(result or {})
                self._advance()
            except OSError as problem:  # of our own files: it must not end in the middle of the client's messages
                self._fail(str(problem), passing=passing_errno(problem.errno))

        self._waiting = True
        try:
            client.start(call, args, on_update, ended)
        except ControlError as error:
            self._waiting = False
            self._refused(call, what, error)

    def _refused(self, call: str, what: str, error: ControlError) -> None:
        if error.code == "closed":
            return  # the next look at the agent says whether it comes back
        if error.code == VM_EXISTS:  # another task of the group was quicker
            self._steps = [self._look_for_vm]
            return
        if error.code == UNDONE:
            self._at_the_top()
            return
        if call == "checkpoint_vm":  # the task is done all the same
            self.log.say(f"{self.task.title}: no checkpoint at its end: {error}")
            return
        if error.code == "no_vm" and self.state is not TaskState.STARTING_VM:
            self._forget_command()
        if call == "stop_vm" and error.code == "no_vm":
            return  # another task of the group was quicker
        text, passing = sentence(call, what, error), is_passing(call, error)
        if call == "resume_vm":  # a saved one may need what this computer has no more; a paused one hangs
            self._useless = self._resumed
        if error.code in VM_FAILED or call == "resume_vm":
            self._vm_failed(text, error.hint)
        elif call in ("put", "get") and not self._retried:
            self._steps = [partial(self._see_whether_vm_failed, text, error.hint, passing)]
        else:
            self._fail(text, error.hint, passing=passing)

    def _see_whether_vm_failed(self, text: str, hint: str, passing: bool, client: ControlClient) -> None:
        """A copy fails because of its files, or because the VM is gone."""

        def listed(result: Mapping[str, Any]) -> None:
            ours = [vm for vm in result.get("vms") or () if vm.get("vm") == self.task.virtualmachine]
            if not ours or ours[0].get("state") in ("crashed", "stopped"):
                self._vm_failed(text, hint)
            else:
                self._fail(text, hint, passing=passing)

        self._ask(client, "vms", {}, listed)

    def _vm_failed(self, text: str, hint: str = "") -> None:
        """Once the task begins anew by itself, in a new VM (one with a checkpoint has gone back to it already).

        A VM that fails again may be this computer's trouble, and pass; that its guest powers it off again is the job's.
        """
        name = self.task.virtualmachine
        console = failed_console(self.slot, name)
        self.log.append_tail(f"the end of the console of the virtual machine {name}", console, CONSOLE_BYTES)
        self._forget_command()
        off = POWERED_OFF in text
        if self._retried:
            again = "; so was the one before: another attempt would not help" if off and self._switched_off else ""
            self._fail(text + again, hint, passing=not again)
            return
        self._switched_off = off
        self._retried, self._started, self._fraction = True, False, 0.0
        self.log.say(f"{self.task.title}: {text}\nbeginning it anew in a new virtual machine, this once")
        self._at_the_top()

    def _at_the_top(self) -> None:
        """See what the VM knows of the task, and go on from there."""
        self._started = False
        self._patience_until = time.monotonic() + START_DEADLINE_S
        self._enter(TaskState.STARTING_VM, [self._look_for_vm])

    def _fail(self, text: str, hint: str = "", passing: bool = False) -> None:
        self._error = TaskError(f"{self.task.title}: {text}", hint, passing)
        self._is_left = passing  # its VM may go back to a checkpoint at the next start, which needs its output
        self._collect_output()

    def _finish(self, end: TaskEnd) -> None:
        if self.state is not TaskState.DONE:
            self.state, self._end, self._steps = TaskState.DONE, end, []
            self._collect_output()

    def _collect_output(self) -> None:
        if self._is_left:
            return
        record = self._record()
        with contextlib.suppress(OSError):  # a full disk shows in the checkpoint that follows
            self._output.collect(self.log, record.output_starts if record is not None else {})

    def _vm(self) -> dict[str, str]:
        return {"vm": self.task.virtualmachine}

    def _vm_now(self) -> dict[str, Any]:
        """The VM, if it is still what the steps know of it."""
        return {**self._vm(), "epoch": self._epoch}

    def _vm_call(self, call: str) -> None:
        """Pause or resume the VM once it is up; before that `_advance` holds the task back."""
        if self.state in IN_VM:
            self._tell(call, self._vm())

    def _signal(self, name: str) -> None:
        record = self._record()
        if self._started and record is not None:
            self._tell("signal", {"command": record.command, "signal": name})

    def _tell(self, call: str, args: Mapping[str, Any]) -> None:
        """A request whose failure changes nothing here: what it was for then shows in the task itself."""

        def ended(_result: object, error: ControlError | None) -> None:
            if error is not None and error.code != "closed":
                self.log.say(f"{self.task.title}: {call}: {error}")

        with contextlib.suppress(VMwrapperError):
            if self._client is not None:
                self._client.start(call, args, on_end=ended)
