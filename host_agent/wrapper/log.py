"""What the wrapper says: lines in the slot's `stderr.txt`, and on the terminal when somebody may be looking."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

STDERR_FILE = "stderr.txt"


class Log:
    """Appends to `stderr.txt`; echoes to our own stderr unless that is the same file (BOINC redirects it there)."""

    def __init__(self, slot: Path) -> None:
        self.path = slot / STDERR_FILE
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            ours, file = os.fstat(2), os.fstat(self._fd)
            self.echo = (ours.st_dev, ours.st_ino) != (file.st_dev, file.st_ino)
        except OSError:  # we were started without a stderr
            self.echo = False

    def say(self, text: str) -> None:
        """One event, with the time and our process id before it, as BOINC's programs write it."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._write(f"{stamp} ({os.getpid()}): {text}\n", f"vmwrapper: {text}\n")

    def progress(self, text: str) -> None:
        """Only for a person who watches; not worth a line in the file."""
        if self.echo:
            self._echo(f"vmwrapper: {text}\n")

    def append_tail(self, title: str, path: Path, limit: int) -> None:
        """The end of a file, as it is, after a line that names it; nothing when it is empty."""
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - limit))
                data = file.read(limit)
        except OSError:
            return
        if data:
            left_out = f", without its first {size - limit:,} bytes" if size > limit else ""
            self.say(f"{title}{left_out}:")
            with contextlib.suppress(OSError):
                os.write(self._fd, data if data.endswith(b"\n") else data + b"\n")

    def sync(self) -> None:
        """Bring it to the disk: somebody may end us, or turn the computer off, at any moment now."""
        with contextlib.suppress(OSError):
            os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def _write(self, line: str, shown: str) -> None:
        try:
            os.write(self._fd, line.encode("utf-8", "backslashreplace"))
        except OSError:  # a full disk must not end the job by itself: the next checkpoint will say so
            self.echo = True
        if self.echo:
            self._echo(shown)

    def _echo(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except (OSError, ValueError):  # the terminal went away
            self.echo = False


def tail(path: Path, start: int = 0, lines: int = 20, limit: int = 4096) -> str:
    """The last lines of a file from offset `start` on, indented and printable; empty when there are none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if start > size:
                start = 0  # it was rotated meanwhile
            file.seek(max(start, size - limit, 0))
            text = file.read(limit).decode("utf-8", "replace")
    except OSError:
        return ""
    kept = text.splitlines()[-lines:]
    shown = ("".join(char if char.isprintable() or char == "\t" else "?" for char in line) for line in kept)
    return "\n".join(f"    {line}" for line in shown if line.strip())
