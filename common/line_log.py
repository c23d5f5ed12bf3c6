"""A file of JSON objects, one a line, that is only appended to: what both agents' memories are made of.

A line is there for good once `append` returned (`flush`), or survives at least the process's own death (no `flush`)
until `flush` makes all of them last. A line that a power cut left half written is the last one; it is cut off when the
file is opened again.

The file is longer than its lines, by zeros: to write over them is all that a flush then has to do, while a file that
grows takes the file system's own journal each time (in an emulated guest 9 ms against 2).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

MOST_BYTES = 256 * 1024 * 1024  # a larger file is not one of ours
ROOM = 16 * 1024  # bytes of zeros that are made at a time

_to_json = json.JSONEncoder(separators=(",", ":")).encode


class LineLog:
    """`entries` are what the file held when it was opened, oldest first; the owner takes them and forgets them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries: list[dict[str, Any]] = []
        self._end = self._size = 0  # of the lines, and of the file
        self._appended = self._flushed = 0  # lines since the file was opened, and how many of them last
        self._load()
        self.lines = len(self.entries)
        self._file = self._open()

    def _load(self) -> None:
        try:
            with self._path.open("rb") as file:
                # Not more than there is: `read` makes room for all that it is asked for, which a small guest has not.
                data = file.read(min(os.fstat(file.fileno()).st_size, MOST_BYTES))
        except FileNotFoundError:
            return
        self._size = len(data)
        whole, newline, rest = data.rstrip(b"\0").rpartition(b"\n")
        self._end = len(whole) + len(newline)
        for line in whole.split(b"\n"):
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # a disk that lost a sector in the middle: the others still count
            if isinstance(entry, dict):
                self.entries.append(entry)
        if rest:
            # A line without its end: cut it off, or the next one would be glued to it.
            os.truncate(self._path, self._end)
            self._size = self._end

    def _open(self) -> int:
        """The file, where its next line goes."""
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
        os.lseek(file, self._end, os.SEEK_SET)
        return file

    def append(self, entry: dict[str, Any], *, flush: bool = True) -> None:
        """Add a line; with `flush` it survives a power cut once this returns. OSError: it is not in the file."""
        line = _to_json(entry).encode("ascii") + b"\n"
        if self._end + len(line) > self._size:
            self._make_room(len(line))
        try:
            written = os.write(self._file, line)
            if written != len(line):
                raise OSError(28, os.strerror(28))  # ENOSPC: a full disk takes the first part of a line
            self._appended += 1
            if flush:
                self.flush()
        except OSError:
            self._cut()
            raise
        self._end += len(line)
        self._size = max(self._size, self._end)
        self.lines += 1

    def flush(self) -> None:
        """All lines survive a power cut once this returns; nothing is done when they do already. OSError."""
        if self._flushed < self._appended:
            _sync(self._file)
            self._flushed = self._appended

    def begin_flush(self) -> Callable[[], None] | None:
        """As `flush`, for another thread: what is returned does it, while lines are added. None: nothing is to be done.

        The file may even be replaced meanwhile: then all of it is on the disk before.
        """
        if os.name == "nt":  # which replaces no file that is open
            self.flush()
        if self._flushed == self._appended:
            return None
        lines, file = self._appended, os.dup(self._file)

        def sync() -> None:
            try:
                _sync(file)
            finally:
                os.close(file)
            self._flushed = max(self._flushed, lines)

        return sync

    def _make_room(self, least: int) -> None:
        zeros = b"\0" * (least + ROOM)
        try:
            if os.write(self._file, zeros) == len(zeros):
                self._size = self._end + len(zeros)
                os.lseek(self._file, self._end, os.SEEK_SET)
                return
        except OSError:
            pass  # a disk so full may yet take the line itself
        self._cut()

    def _cut(self) -> None:
        os.ftruncate(self._file, self._end)
        os.lseek(self._file, self._end, os.SEEK_SET)
        self._size = self._end

    def rewrite(self, entries: Iterable[dict[str, Any]]) -> None:
        """Replace the whole file, so that a crash leaves the old one or the new one."""
        fresh = self._path.with_name(self._path.name + ".new")
        lines = [_to_json(entry).encode("ascii") + b"\n" for entry in entries]
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o600)
        with os.fdopen(handle, "wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.close(self._file)
        fresh.replace(self._path)
        self._end = self._size = sum(map(len, lines))
        self._flushed = self._appended
        self._file = self._open()
        self.lines = len(lines)

    def close(self) -> None:
        """Leave the file as long as its lines."""
        os.ftruncate(self._file, self._end)
        os.close(self._file)


def _sync(descriptor: int) -> None:
    getattr(os, "fdatasync", os.fsync)(descriptor)
