"""A file of JSON objects, one a line, that is only appended to: what both agents' memories are made of.

A line is there for good once `append` returned (`flush`), or survives at least the process's own death (no `flush`).
A line that a power cut left half written is the last one; it is cut off when the file is opened again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MOST_BYTES = 256 * 1024 * 1024  # a larger file is not one of ours


class LineLog:
    """`entries` are what the file held when it was opened, oldest first; the owner takes them and forgets them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries: list[dict[str, Any]] = []
        self._load()
        self.lines = len(self.entries)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)

    def _load(self) -> None:
        try:
            with self._path.open("rb") as file:
                # Not more than there is: `read` makes room for all that it is asked for, which a small guest has not.
                data = file.read(min(os.fstat(file.fileno()).st_size, MOST_BYTES))
        except FileNotFoundError:
            return
        whole, _, rest = data.rpartition(b"\n")
        for line in whole.split(b"\n"):
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # a disk that lost a sector in the middle: the others still count
            if isinstance(entry, dict):
                self.entries.append(entry)
        if rest:
            # A line without its end: cut it off, or the next one would be glued to it.
            os.truncate(self._path, len(data) - len(rest))

    def append(self, entry: dict[str, Any], *, flush: bool = True) -> None:
        """Add a line; with `flush` it survives a power cut once this returns. OSError: it is not in the file."""
        line = json.dumps(entry, separators=(",", ":")).encode("ascii") + b"\n"
        start = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            if written != len(line):
                raise OSError(28, os.strerror(28))  # ENOSPC: a full disk takes the first part of a line
            if flush:
                _sync(self._file)
        except OSError:
            os.ftruncate(self._file, start)
            raise
        self.lines += 1

    def rewrite(self, entries: Iterable[dict[str, Any]]) -> None:
        """Replace the whole file, so that a crash leaves the old one or the new one."""
        fresh = self._path.with_name(self._path.name + ".new")
        lines = [json.dumps(entry, separators=(",", ":")).encode("ascii") + b"\n" for entry in entries]
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o600)
        with os.fdopen(handle, "wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.close(self._file)
        fresh.replace(self._path)
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0))
        self.lines = len(lines)

    def close(self) -> None:
        os.close(self._file)


def _sync(descriptor: int) -> None:
    getattr(os, "fdatasync", os.fsync)(descriptor)
