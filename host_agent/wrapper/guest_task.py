"""A task in a virtual machine: VM up, files in, program run, files out; all through the control interface.

    READY → WAITING_FOR_AGENT → STARTING_VM → COPYING_IN → RUNNING → COPYING_OUT → DONE

Every state is left by an answer of the host agent; an error in any of them ends the task.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs

from common.errors import VMwrapperError

from ..control_client import ControlClient, ControlError
from .agent_process import AgentLink
from .job import Task
from .log import STDERR_FILE, tail
from .resolve import Macros, command_words, environment, in_guest, resolve_path
from .tasks import TaskEnd, TaskError, TaskState

FRACTION_FILE = "fraction_done"  # in the guest's home, when the job names no other
START_DEADLINE_S = 600.0  # a cold boot without hardware virtualisation is slow

Step = Callable[[ControlClient], None]


@attrs.define(eq=False)
class GuestTask:
    """A `RunningTask` in a VM."""

    task: Task
    slot: Path
    macros: Macros
    agent: AgentLink
    say: Callable[[str], None]
    extra_words: tuple[str, ...] = ()
    state: TaskState = TaskState.READY
    _steps: list[Step] = attrs.field(factory=list)  # what is left to do in this state
    _waiting: bool = False  # an answer is due; the next step must wait for it
    _suspended: bool = False
    _timed_out: bool = False
    _command: str = ""
    _cpu_s: float = 0.0
    _fraction: float = 0.0
    _stderr_start: int = 0
    _end: TaskEnd | None = None
    _error: TaskError | None = None

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
        if client is not None and self.state is TaskState.WAITING_FOR_AGENT:
            self._enter(TaskState.STARTING_VM, [self._look_for_vm])
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

    def expire(self) -> None:
        self._timed_out = True
        if self.state is TaskState.RUNNING:
            self._signal("KILL")
        elif self.state is not TaskState.DONE:
            self._finish(TaskEnd(timed_out=True))

    def kill(self) -> None:
        if self.state is TaskState.RUNNING:
            self._signal("KILL")
        self._finish(self._end or TaskEnd(signal="SIGKILL"))

    def cpu_seconds(self) -> float:
        return self._cpu_s

    def fraction(self) -> float:
        return 1.0 if self.state is TaskState.DONE else self._fraction

    def error_tail(self) -> str:
        name = self.task.stderr_filename
        return tail(resolve_path(self.slot, name), self._stderr_start) if name else ""

    # Steps, in the order in which they happen

    def _look_for_vm(self, client: ControlClient) -> None:
        self._ask(client, "vms", {}, self._vms_listed)

    def _vms_listed(self, result: Mapping[str, Any]) -> None:
        for vm in result.get("vms") or ():
            if vm.get("vm") == self.task.virtualmachine and vm.get("agent") == "present":
                if vm.get("state") == "paused":
                    self._steps.append(lambda client: self._ask(client, "resume_vm", self._vm(), self._vm_ready))
                    return
                if vm.get("state") == "running":
                    self._vm_ready(vm)
                    return
        self._steps.append(self._start_vm)

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
            "directory": str(self.slot),
            "deadline_s": START_DEADLINE_S,
        }
        self._ask(client, "start_vm", args, self._vm_ready, self._vm_update)

    def _vm_update(self, name: str, data: Mapping[str, Any]) -> None:
        if name == "state":
            reason = f": {data['reason']}" if data.get("reason") else ""
            self.say(f"virtual machine {self.task.virtualmachine} is {data.get('state')}{reason}")

    def _vm_ready(self, _result: Mapping[str, Any]) -> None:
        self._enter(TaskState.COPYING_IN, [partial(self._put, name, there) for name, there in self._inputs()])
        self._steps.append(self._run_command)

    def _put(self, name: str, destination: str, client: ControlClient) -> None:
        source = str(resolve_path(self.slot, name).resolve())
        self._ask(client, "put", {**self._vm(), "source": source, "destination": destination}, what=repr(name))

    def _run_command(self, client: ControlClient) -> None:
        self._enter(TaskState.RUNNING)
        task = self.task
        own = str(self.slot / STDERR_FILE)
        program = f"./{_basename(task.application)}" if task.copy_app_to_vm else task.application
        args = {
            **self._vm(),
            "argv": [program, *command_words(task, self.slot, self.macros, self.extra_words)],
            "command": "",
            "env": environment(task, self.macros),
            "cwd": in_guest(self.macros).expand(task.exec_dir),
            "stdin": task.stdin_filename,
            "stdout": str(resolve_path(self.slot, task.stdout_filename)) if task.stdout_filename else own,
            "stderr": str(resolve_path(self.slot, task.stderr_filename)) if task.stderr_filename else own,
            "stream": False,
            "fraction_file": task.fraction_done_filename or FRACTION_FILE,
            "deadline_s": 0,
        }
        self._ask(client, "run", args, self._run_ended, self._run_update)

    def _run_update(self, name: str, data: Mapping[str, Any]) -> None:
        if name == "started":
            self._command = str(data.get("command", ""))
            if self._timed_out:
                self._signal("KILL")
        elif name == "fraction":
            self._fraction = min(1.0, max(0.0, _number(data.get("fraction"))))
        elif name == "usage":
            self._cpu_s = max(self._cpu_s, _number(data.get("cpu_s")))

    def _run_ended(self, result: Mapping[str, Any]) -> None:
        self._cpu_s = max(self._cpu_s, _number(result.get("user_s")) + _number(result.get("system_s")))
        outcome, reason = result.get("outcome"), str(result.get("reason") or "")
        if outcome == "lost":
            self._fail(f"what became of its program is not known: {reason}")
            return
        if outcome == "exited":
            end = TaskEnd(int(_number(result.get("exit_code"))), timed_out=self._timed_out)
        elif outcome == "signalled":
            name = str(result.get("signal") or "a signal")
            name = name if name.startswith(("SIG", "a ")) else f"SIG{name}"
            end = TaskEnd(signal=name, timed_out=self._timed_out)
        elif outcome == "deadline":
            end = TaskEnd(timed_out=True)
        else:
            end = TaskEnd(exit_code=127, reason=reason or str(outcome))
        self._end = None
        if not end.ok:
            self._finish(end)
            return
        steps: list[Step] = [partial(self._get, name) for name in self.task.copy_files_from_vm]
        self._enter(TaskState.COPYING_OUT, [*steps, lambda _client: self._finish(end)])

    def _get(self, name: str, client: ControlClient) -> None:
        destination = str(resolve_path(self.slot, name))
        args = {**self._vm(), "source": name, "destination": destination}
        self._ask(client, "get", args, what=repr(name))

    # How steps are taken

    def _enter(self, state: TaskState, steps: list[Step] | None = None) -> None:
        self.state = state
        self._steps = steps or []

    def _advance(self) -> None:
        """Take the next steps, unless an answer is due, the client wants quiet, or there is no agent yet."""
        while self._steps and not (self._waiting or self._suspended or self._error):
            try:
                client = self.agent.client()
            except TaskError as error:
                self._error = error
                return
            if client is None:
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
            self._waiting = False
            if self.state is TaskState.DONE:
                return
            if error is not None:
                self._fail(f"{_DOING[call]}{f' ({what})' if what else ''}: {error}", error.hint)
                return
            if then is not None:
                then(result or {})
            self._advance()

        self._waiting = True
        try:
            client.start(call, args, on_update, ended)
        except ControlError as error:
            self._waiting = False
            self._fail(str(error), error.hint)

    def _fail(self, text: str, hint: str = "") -> None:
        self._error = TaskError(f"{self.task.title}: {text}", hint)

    def _finish(self, end: TaskEnd) -> None:
        self.state, self._end, self._steps = TaskState.DONE, end, []

    def _vm(self) -> dict[str, str]:
        return {"vm": self.task.virtualmachine}

    def _vm_call(self, call: str) -> None:
        """Pause or resume the VM once it is up; before that `_advance` holds the task back."""
        if self.state in (TaskState.COPYING_IN, TaskState.RUNNING, TaskState.COPYING_OUT):
            self._tell(call, self._vm())

    def _signal(self, name: str) -> None:
        if self._command:
            self._tell("signal", {"command": self._command, "signal": name})

    def _tell(self, call: str, args: Mapping[str, Any]) -> None:
        """A request whose failure changes nothing here: what it was for then shows in the task itself."""

        def ended(_result: object, error: ControlError | None) -> None:
            if error is not None:
                self.say(f"{self.task.title}: {call}: {error}")

        with contextlib.suppress(VMwrapperError):
            client = self.agent.client()
            if client is not None:
                client.start(call, args, on_end=ended)

    def _inputs(self) -> list[tuple[str, str]]:
        """Files of the slot and their names in the guest, in the order of copying."""
        return guest_inputs(self.task)


def guest_inputs(task: Task) -> list[tuple[str, str]]:
    """What is copied into the VM before a task: names in the slot and in the guest's home."""
    inputs = [(task.application, _basename(task.application))] if task.copy_app_to_vm else []
    inputs += [(name, name) for name in task.copy_files_to_vm]
    stdin = task.stdin_filename
    if stdin and task.copy_stdin_to_vm and stdin not in task.copy_files_to_vm:
        inputs.append((stdin, stdin))
    return inputs


def check_files(task: Task, slot: Path) -> None:
    """The files of a guest task that must be in the slot when it starts. Raises TaskError."""
    for name, _there in guest_inputs(task):
        if not resolve_path(slot, name).exists():
            raise TaskError(
                f"{task.title}: there is no {name!r} in the slot to copy into the VM", f"the slot is {slot}"
            )


_DOING = {
    "vms": "the host agent's virtual machines could not be listed",
    "start_vm": "the virtual machine could not be started",
    "resume_vm": "the virtual machine could not be resumed",
    "put": "a file could not be copied into the virtual machine",
    "run": "the program could not be run in the virtual machine",
    "get": "a file could not be copied out of the virtual machine",
}


def _basename(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2]


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and value == value else 0.0
