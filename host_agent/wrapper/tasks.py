"""The life of one task while it runs: what a task on the host and one in a virtual machine have in common."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Protocol

import attrs

from common.errors import VMwrapperError


class TaskError(VMwrapperError):
    """A task that could not be run, by no fault of its program: a missing file, a VM, a copy, the host agent."""


class TaskState(enum.Enum):
    """Where a task stands. A host task has only READY, RUNNING and DONE."""

    READY = "ready"
    WAITING_FOR_AGENT = "waiting for the host agent"
    STARTING_VM = "starting the virtual machine"
    COPYING_IN = "copying files into the virtual machine"
    RUNNING = "running"
    COPYING_OUT = "copying files out of the virtual machine"
    DONE = "done"


@attrs.frozen
class TaskEnd:
    """How a task's program ended."""

    exit_code: int = 0
    signal: str = ""  # a name such as SIGKILL, when a signal ended it
    timed_out: bool = False  # its time limit was up; BOINC's wrapper then goes on with the next task
    reason: str = ""  # why it could not run at all

    @property
    def ok(self) -> bool:
        """Whether the job goes on."""
        return self.timed_out or (self.exit_code == 0 and not self.signal and not self.reason)

    @property
    def sentence(self) -> str:
        """The end of a sentence that begins with the task's name."""
        if self.timed_out:
            return "reached its time limit and was ended"
        if self.reason:
            return f"could not be run: {self.reason}"
        if self.signal:
            return f"was ended by {self.signal}"
        return f"ended with exit status {self.exit_code}"


class RunningTask(Protocol):
    """What the loop does with a task; the methods of the first VMwrapper's TASK class."""

    state: TaskState

    def check(self) -> None:
        """Whether the files that it needs are there. Raises TaskError; starts nothing."""

    def run(self) -> None:
        """Start it. Raises TaskError when it cannot be started; nothing then runs."""

    def poll(self) -> TaskEnd | None:
        """How it ended, or None while it goes on. Never waits. Raises TaskError."""

    def stop(self) -> None:
        """Suspend it; doing it twice is doing it once."""

    def resume(self) -> None: ...

    def expire(self) -> None:
        """Its time limit is up: end the program; `poll()` then says `timed_out`."""

    def kill(self) -> None:
        """End it at once and for good."""

    def cpu_seconds(self) -> float:
        """CPU time so far, user and system, its children included; never goes down."""

    def fraction(self) -> float:
        """How much of it is done, 0 to 1."""

    def error_tail(self) -> str:
        """The last lines that it wrote to a standard error file of its own."""


def read_fraction(path: Path) -> float:
    """The last number of a fraction done file, 0 to 1; 0 when there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 256))
            words = file.read(256).split()
    except OSError:
        return 0.0
    for word in reversed(words):
        try:
            value = float(word)
        except ValueError:
            continue
        return min(1.0, max(0.0, value)) if value == value else 0.0
    return 0.0
