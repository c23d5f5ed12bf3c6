"""`wrapper_checkpoint.txt`: one line, `tasks done, CPU seconds, run time seconds`, as BOINC's wrapper writes it.

That the file is there also says that the unzip tasks are done: it is first written after them.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import NamedTuple

CHECKPOINT_FILE = "wrapper_checkpoint.txt"


class Checkpoint(NamedTuple):
    """What a restarted wrapper must know."""

    tasks_done: int = 0
    cpu_s: float = 0.0
    run_time_s: float = 0.0


def read_checkpoint(slot: Path) -> Checkpoint | None:
    """The last checkpoint, or None when there is none that is whole (the job then begins anew)."""
    try:
        with (slot / CHECKPOINT_FILE).open("rb") as file:
            match = _LINE.fullmatch(file.read(200))
    except OSError:
        return None
    return Checkpoint(int(match[1]), float(match[2]), float(match[3])) if match else None


def write_checkpoint(slot: Path, checkpoint: Checkpoint) -> None:
    """Replace the file at once: a crash leaves the old line or the new one, on the disk."""
    line = f"{checkpoint.tasks_done} {checkpoint.cpu_s:.6f} {checkpoint.run_time_s:.6f}\n"
    write_atomically(slot / CHECKPOINT_FILE, line)


# Without its end of line it may be the beginning of a longer number, written by a program less careful than we are.
_LINE = re.compile(rb"(\d{1,9}) (\d{1,15}\.\d{6}) (\d{1,15}\.\d{6})\n")


def write_atomically(path: Path, text: str, durable: bool = True) -> None:
    """Write a small file so that a reader sees all of it or none; `durable`: also after a power cut."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)
    if durable:
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Bring the names in a directory to the disk; a system that cannot (Windows) does so by itself."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
