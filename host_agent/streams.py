"""A command's output on this host: files that grow while the program runs.

How much of a stream the host has is read off the file itself, so a killed host agent goes on at the right byte: a
file that the requester named belongs to that stream alone while the command runs, and what stands in it beyond its
length at the start is the stream. A stream without a file of the requester's goes to a *spool* of ours, which keeps
its last bytes only; its name says how many were dropped before them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from common.errors import VMwrapperError

SPOOL_MOST = 1024 * 1024  # bytes; when a spool is longer, its first half is dropped
REPLAY_MOST = 1024 * 1024  # bytes of earlier output that somebody who attaches can get
PIECE = 64 * 1024


class OutputGap(VMwrapperError):
    """Output that the guest does not have any more and the host never got."""


class OutputStream:
    """One stream. `have` bytes of it are in the file at `path`, which is made with the first of them."""

    def __init__(self, path: str, start: int, *, fresh: bool = False) -> None:
        """`start`: where in the file the stream's first byte stands (below 0: so many bytes are not in it).

        `fresh`: nothing can be there of it yet, so nothing is looked for.
        """
        self._place = path  # a text: most commands print nothing, and a `Path` costs more than all else here
        self.start = start
        self._file = -1
        self._there = not fresh  # there may be a file
        self.have = 0 if fresh else max(0, self._size() - start)

    @property
    def path(self) -> Path:
        return Path(self._place)

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return max(0, self.start)

    def take(self, offset: int, payload: bytes) -> bytes:
        """Write what is new in a piece; returns it. A repeat adds nothing. OSError, OutputGap."""
        if offset > self.have:
            raise OutputGap(f"output is missing between bytes {self.have} and {offset}")
        fresh = payload[self.have - offset :]
        if not fresh:
            return b""
        if self._file < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
            self._file = os.open(self._place, flags, 0o644)
            self._there = True
        view = memoryview(fresh)
        while view:
            view = view[os.write(self._file, view) :]
        self.have += len(fresh)
        return fresh

    def replay(self, offset: int) -> Iterator[tuple[int, bytes]]:
        """Earlier output from `offset` on, as (offset, bytes); at most the last `REPLAY_MOST` bytes."""
        offset = max(offset, self.have - REPLAY_MOST, -self.start, 0)
        if offset >= self.have:
            return
        with self.path.open("rb") as file:
            file.seek(offset + self.start)
            while offset < self.have:
                data = file.read(min(PIECE, self.have - offset))
                if not data:
                    return
                yield offset, data
                offset += len(data)

    def holds(self, have: int) -> bool:
        """Whether so many bytes of it are on the disk."""
        return self._size() - self.start >= have

    def cut(self, have: int) -> None:
        """Go back to the first `have` bytes: the rest was undone."""
        self.close()
        if have < self.have and self.path.exists():
            os.truncate(self.path, max(0, have + self.start))
        self.have = min(have, self.have)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def forget(self) -> None:
        """Nobody will ask for it any more."""
        self.close()


class SpoolStream(OutputStream):
    """A stream in a file of ours: `<stem>.<bytes dropped before it>`."""

    def __init__(self, stem: str, *, fresh: bool = False) -> None:
        self._stem = stem
        if fresh:
            super().__init__(f"{stem}.0", 0, fresh=True)
            return
        found = sorted(self._files(), key=_dropped)
        for older in found[:-1]:
            older.unlink(missing_ok=True)
        path = found[-1] if found else Path(f"{stem}.0")
        super().__init__(str(path), -_dropped(path))

    def _files(self) -> list[Path]:
        folder, name = os.path.split(self._stem)
        # Not glob(): it would compile a regular expression for each stream.
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.name.startswith(f"{name}.")]

    def take(self, offset: int, payload: bytes) -> bytes:
        fresh = super().take(offset, payload)
        if self.have + self.start > SPOOL_MOST:
            self._drop_first_half()
        return fresh

    def _drop_first_half(self) -> None:
        self.close()
        path = self.path
        data = path.read_bytes()
        kept = data[len(data) // 2 :]
        dropped = self.have - len(kept)
        stem = Path(self._stem)
        temporary = stem.with_name(f".{stem.name}.new")
        temporary.write_bytes(kept)
        temporary.replace(f"{stem}.{dropped}")
        path.unlink()
        self._place, self.start = f"{stem}.{dropped}", -dropped

    def forget(self) -> None:
        super().forget()
        if self._there:
            self.path.unlink(missing_ok=True)


def _dropped(path: Path) -> int:
    number = path.suffix[1:]
    return int(number) if number.isdecimal() else 0
