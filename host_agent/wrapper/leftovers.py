"""Which processes the wrapper started: after a crash the next wrapper ends them before it starts them again.

Without this, a wrapper that was killed leaves its task running, and the restarted one would run it twice at once.
"""

from __future__ import annotations

import os
from pathlib import Path

from .checkpoint import write_atomically

PROCESSES_FILE = "wrapper_processes.txt"


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
        if os.name == "posix":
            from .host_task_posix import kill_leftover

            for line in lines:
                number, _, mark = line.partition(" ")
                if number.isdecimal() and int(number) > 1:
                    ended += kill_leftover(int(number), mark)
        self._path.unlink(missing_ok=True)
        return ended

    def add(self, pid: int) -> None:
        """A process was started."""
        if os.name == "posix":
            from .host_task_posix import start_mark

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
