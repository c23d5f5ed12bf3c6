"""What is kept of a task in a VM while it runs: the whole VM, or only its program's own checkpoint file.

Both at the client's period, and not more often than the job's minimum. A checkpoint that fails changes nothing: the
job goes on, the earlier one stands, and the next is tried when it is due.

A program's file belongs to what it had printed. So it is copied beside the last one; then the lengths of the output are
written down (`output_copied`), then it takes the last one's place, then its lengths do (`output_kept`). Whoever is
started after a kill in between sees by what is written down which of the two files counts.
"""

from __future__ import annotations

import contextlib
import glob
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from common.errors import VMwrapperError

from ..control_client import ControlClient, ControlError
from .checkpoint import sync_directory
from .job import Task
from .resolve import resolve_path

COPIED = ".copied"
VM_PERIOD_S = 600.0  # at least, for whole VMs: each costs the volunteer's disk some ten MB and more

Say = Callable[[str], None]


@attrs.define(eq=False)
class Pace:
    """When the next checkpoint may be made; one for each VM, which the tasks in it share."""

    period_s: float
    _next: float = attrs.field(init=False)
    _under_way: bool = False

    def __attrs_post_init__(self) -> None:
        self._next = time.monotonic() + self.period_s

    def begin(self) -> bool:
        """Whether one may begin now; it then has."""
        if self._under_way or time.monotonic() < self._next:
            return False
        self._under_way = True
        return True

    def end(self) -> None:
        """It has ended, well or not."""
        self._under_way = False
        self._next = time.monotonic() + self.period_s


class Paces:
    """The pace of each VM of a job."""

    def __init__(self, period_s: float | None) -> None:
        """`period_s`: the job's own; None: it gives none."""
        self._period_s = period_s
        self._paces: dict[tuple[str, int], Pace] = {}

    def of(self, task: Task) -> Pace:
        """A VM's; a task's own when only its program's file is kept."""
        by_file = bool(task.checkpoint_filename)
        period_s = self._period_s if self._period_s is not None else (0.0 if by_file else VM_PERIOD_S)
        return self._paces.setdefault((task.virtualmachine, task.number if by_file else 0), Pace(period_s))


@attrs.define(eq=False)
class GuestCheckpoints:
    """The checkpoints of one task."""

    task: Task
    slot: Path
    pace: Pace
    say: Say
    copy: str = attrs.field(
        factory=lambda: os.urandom(4).hex()
    )  # in the names of our copies: an earlier wrapper's may come yet
    _digest: str = ""  # of the program's file, as it was last copied
    _trouble: str = ""  # as last told
    _kept_cpu_s: float | None = None

    @property
    def by_file(self) -> bool:
        return bool(self.task.checkpoint_filename)

    @property
    def file(self) -> Path:
        """The program's own checkpoint, in the slot."""
        return resolve_path(self.slot, self.task.checkpoint_filename)

    def take(self, copy: str) -> None:
        """A newer one counts from now on; it may have its place already. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            self._copied(copy).replace(self.file)
            sync_directory(self.file.parent)

    def forget_copies(self) -> None:
        """Of which nobody knows to what output they belong. Raises OSError."""
        for path in self.file.parent.glob(f"{glob.escape(self.file.name)}.*{COPIED}"):
            path.unlink(missing_ok=True)

    def _copied(self, copy: str) -> Path:
        return self.file.with_name(f"{self.file.name}.{copy}{COPIED}")

    def kept(self) -> float | None:
        """CPU seconds of the work that has been kept since this was last asked; None: nothing has."""
        kept, self._kept_cpu_s = self._kept_cpu_s, None
        return kept

    def begin(self, client: ControlClient, cpu_s: float) -> None:
        """Make one, unless it is too early; `kept()` tells when it is there."""
        if self.task.no_checkpoints or not self.pace.begin():
            return
        if self.by_file:
            self._ask(client, "get", self._get_arguments(), cpu_s)
        else:
            self._ask(client, "checkpoint_vm", vm_arguments(self.task, cpu_s), cpu_s)

    def _get_arguments(self) -> dict[str, Any]:
        vm, name = self.task.virtualmachine, self.task.checkpoint_filename
        return {"vm": vm, "source": name, "destination": str(self._copied(self.copy))}

    def _ask(self, client: ControlClient, call: str, args: Mapping[str, Any], cpu_s: float) -> None:
        def ended(result: Mapping[str, Any] | None, error: ControlError | None) -> None:
            self.pace.end()
            if error is not None:
                self._failed(error)
                return
            digest = str((result or {}).get("sha256") or "")
            if not (self.by_file and digest and digest == self._digest):
                self._digest, self._trouble, self._kept_cpu_s = digest, "", cpu_s

        try:
            client.start(call, args, on_end=ended)
        except VMwrapperError:
            self.pace.end()  # the agent is gone, and its successor will be asked

    def _failed(self, error: ControlError) -> None:
        if error.code in ("closed", "undone") or (self.by_file and error.code == "copy_failed"):
            return  # asked again soon; or the program has not written its file yet
        self.failed(str(error))

    def failed(self, why: str) -> None:
        """Say so, once for each reason."""
        if why != self._trouble:
            self._trouble = why
            self.say(f"{self.task.title}: no checkpoint, and it goes on without: {why}")


def vm_arguments(task: Task, cpu_s: float) -> dict[str, Any]:
    """To keep the VM of a task, and with it what we know of the task."""
    return {"vm": task.virtualmachine, "note": {"task": task.number, "cpu_s": cpu_s}}
