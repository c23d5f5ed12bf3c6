"""Where the output of a program in a VM goes: two files that nobody else writes to while it runs.

The host agent appends to them as the output comes, and after a restart of its own goes on where they end. So a task's
two streams do not share a file, and `stderr.txt`, where the wrapper writes, is never one of them: output without
a file of its own is kept beside, and its end goes to `stderr.txt` when the program has ended.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from .job import Task
from .log import Log
from .resolve import resolve_path

TAIL_BYTES = 64 * 1024  # the client keeps no more of stderr.txt


class CommandOutput:
    """The output files of one task."""

    def __init__(self, task: Task, slot: Path) -> None:
        self._title = task.title
        self._named = {
            stream: resolve_path(slot, name)
            for stream, name in (("stdout", task.stdout_filename), ("stderr", task.stderr_filename))
            if name
        }
        self._own = {stream: slot / f"vm_task_{task.number}.{stream}" for stream in ("stdout", "stderr")}
        self._joined = len(self._named) == 2 and len({os.path.realpath(path) for path in self._named.values()}) == 1

    def path(self, stream: str) -> Path:
        """Where the host agent writes a stream."""
        return self._own[stream] if self._joined else self._named.get(stream, self._own[stream])

    def sizes(self) -> dict[str, int]:
        """How long the named files are: what is in them before the program runs is another's."""
        return {stream: _size(path) for stream, path in self._named.items()}

    def lengths(self) -> dict[str, int]:
        """How long the files are into which the host agent writes; so much is on the disk then. Raises OSError."""
        return {stream: _synced_size(self.path(stream)) for stream in self._own}

    def reset(self, starts: Mapping[str, int], kept: Mapping[str, int]) -> None:
        """Before the program runs: take away what an earlier attempt wrote. Raises OSError.

        `kept`: what `lengths()` said when the program saved the state from which it goes on; empty: it begins anew.
        """
        for stream, own in self._own.items():
            named = self._named.get(stream)
            if named is not None and own != self.path(stream):
                _cut(named, kept.get(stream, starts.get(stream, 0)))
            elif named is not None:
                _cut(named, starts.get(stream, 0))
            if own == self.path(stream) and kept:
                _cut(own, kept.get(stream, 0))
            else:
                own.unlink(missing_ok=True)

    def collect(self, log: Log, starts: Mapping[str, int]) -> None:
        """After the end: bring the output that has no file of its own where it belongs. Raises OSError."""
        if self._joined:
            self._join(starts)
        for stream, path in self._own.items():
            log.append_tail(f"{self._title} wrote to its {stream}", path, TAIL_BYTES)
            path.unlink(missing_ok=True)

    def _join(self, starts: Mapping[str, int]) -> None:
        """Both streams to one file; done again, when we were killed in it, it comes to the same."""
        target = self._named["stdout"]
        with target.open("ab") as file:
            file.truncate(min(starts.get("stdout", 0), _size(target)))
            for path in self._own.values():
                if path.exists():
                    with path.open("rb") as source:
                        shutil.copyfileobj(source, file)
            file.flush()
            os.fsync(file.fileno())
        for path in self._own.values():
            path.unlink(missing_ok=True)


def _cut(path: Path, length: int) -> None:
    if _size(path) > length:
        os.truncate(path, length)


def _synced_size(path: Path) -> int:
    if not path.exists():
        return 0
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
