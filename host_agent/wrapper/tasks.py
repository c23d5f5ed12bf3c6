"""The life of one task while it runs: what a task on the host and one in a virtual machine have in common."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from common.errors import VMwrapperError


class TaskError(VMwrapperError):
    """A task that could not be run, by no fault of its program: a missing file, a VM, a copy, the host agent.

    `passing`: it may help to try again in a while.
    """

    def __init__(self, sentence: str, hint: str = "", passing: bool = False) -> None:
        super().__init__(sentence, hint)
        self.passing = passing


class TaskState(enum.Enum):
    """Where a task stands. A host task has only READY, RUNNING and DONE."""

    READY = "ready"
    WAITING_FOR_AGENT = "waiting for the host agent"
    STARTING_VM = "starting the virtual machine"
    COPYING_IN = "copying files into the virtual machine"
    RUNNING = "running"
    COPYING_OUT = "copying files out of the virtual machine"
    DONE = "done"


TIME_LIMIT = "reached its time limit and was ended"
ENDED_EARLY = "was ended early, because the project asked for it"


class TaskEnd(NamedTuple):
    """How a task's program ended."""

    exit_code: int = 0
    signal: str = ""  # a name such as SIGKILL, when a signal ended it
    on_purpose: str = ""  # why we ended it ourselves; the job then goes on
    reason: str = ""  # why it could not run at all

    @property
    def ok(self) -> bool:
        """Whether the job goes on."""
        return bool(self.on_purpose) or (self.exit_code == 0 and not self.signal and not self.reason)

    @property
    def sentence(self) -> str:
        """The end of a sentence that begins with the task's name."""
        if self.on_purpose:
            return self.on_purpose
        if self.reason:
            return f"could not be run: {self.reason}"
        if self.signal:
            return f"was ended by {self.signal}"
        return f"ended with exit status {self.exit_code}"


Left = Callable[[float], None]
"""Waits until a task is kept, or this time of the monotonic clock: the client gives us a minute."""


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

    def expire(self, why: str = TIME_LIMIT) -> None:
        """End the program, which is no failure; `poll()` then says so."""

    def ask_to_end(self) -> None:
        """Ask the program to end by itself, because the project wants no more; `expire()` follows if it does not."""

    def kill(self) -> None:
        """End it at once and for good."""

    def leave(self) -> Left:
        """We have to go: begin to keep the task as it stands for the next start; what is returned waits for that.

        Never raises. When it cannot be kept, the task is not DONE afterwards.
        """

    def cpu_seconds(self, now: bool = False) -> float:
        """CPU time so far, user and system, its children included; `now`: not some seconds ago.

        It goes down only where work was lost, and never below what was kept.
        """

    @property
    def counted_s(self) -> float:
        """CPU time of it that an earlier wrapper's checkpoint has counted; `cpu_seconds()` begins there."""

    def kept(self, wanted: bool) -> float | None:
        """Keep what it has done, when that is due; `wanted`: the client's period is over.

        Returns the CPU seconds that no failure can take back any more, when they have become more since it was last
        asked. Never waits and never fails: a task that cannot be kept goes on as it was.
        """

    def fraction(self) -> float:
        """How much of it is done, 0 to 1."""

    def other_pid(self) -> int:
        """A process that is not below the wrapper and belongs to the task: a virtual machine's; 0: none."""

    def traffic(self) -> tuple[float, float]:
        """Bytes that it has sent to and received from the network, as far as that is known."""

    def error_tail(self) -> str:
        """The last lines that it wrote to a standard error file of its own."""


def read_fraction(path: Path) -> float:
    """A fraction done file: the number at the beginning of the last line that begins with one; 0 to 1."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 256))
            lines = file.read(256).splitlines()
    except OSError:
        return 0.0
    for line in reversed(lines):
        if match := _FRACTION.match(line):
            return min(1.0, max(0.0, float(match[0])))
    return 0.0


_FRACTION = re.compile(rb"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
