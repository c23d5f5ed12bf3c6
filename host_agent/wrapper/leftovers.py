"""Which processes the wrapper started: after a crash the next wrapper ends them before it starts them again.

A task's leader ends its task when the wrapper dies. Without this file, a task whose leader was killed too would go
on, and the restarted wrapper would run it twice at once.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from common.errors import VMwrapperError

from ..process_identity import same_boot, start_mark
from .checkpoint import write_atomically
from .process_tree import all_processes, descendants, kill_all, session_members
from .task_groups import sweep_groups

PROCESSES_FILE = "wrapper_processes.txt"
END_DEADLINE_S = 5.0  # for a leader to end its task by itself, after its wrapper's death


class Leftovers:
    """`wrapper_processes.txt`: a line `number mark` for every process (session) that runs now."""

    def __init__(self, slot: Path) -> None:
        self._path = slot / PROCESSES_FILE
        self._running: dict[int, str] = {}

    def end_all(self) -> int:
        """End what an earlier wrapper left; returns how many process groups that were."""
        try:
            lines = self._path.read_text("utf-8")[:65536].splitlines()
        except OSError:
            return 0
        ended = 0
        for line in lines:
            number, _, mark = line.partition(" ")
            if os.name == "posix" and number.isdecimal() and int(number) > 1:
                ended += kill_leftover(int(number), mark)
        self._path.unlink(missing_ok=True)
        if os.name == "posix":
            with contextlib.suppress(OSError, VMwrapperError):  # without a place for the ledger there are none
                sweep_groups()
        return ended

    def add(self, pid: int) -> None:
        """A process was started."""
        self._running[pid] = start_mark(pid)
        self._write()

    def remove(self, pid: int) -> None:
        """It ended."""
        if self._running.pop(pid, None) is not None:
            self._write()

    def _write(self) -> None:
        if self._running:
            lines = "".join(f"{pid} {mark}\n" for pid, mark in self._running.items())
            write_atomically(self._path, lines, durable=False)  # after a power cut nothing runs any more
        else:
            self._path.unlink(missing_ok=True)


def kill_leftover(leader: int, mark: str) -> bool:
    """End what an earlier wrapper left below a leader, or in the leader's session when the leader is gone too.

    False when there was nothing, or the number belongs to somebody else by now.
    """
    if not same_boot(mark) or (current := start_mark(leader)) not in ("", mark):
        return False
    until = time.monotonic() + END_DEADLINE_S
    while current == mark and time.monotonic() < until:
        time.sleep(0.02)  # it is no child of ours, and may be ending its tree just now
        current = start_mark(leader)
    members = [each.pid for each in (*descendants(leader), *session_members(leader)) if each.alive]
    if members:
        kill_all(lambda: [each for each in all_processes() if each.pid in members or each.session == leader])
    return bool(members)
