"""`wrapper_checkpoint.txt`: one line, `tasks done, CPU seconds, run time seconds`, as BOINC's wrapper writes it.

That the file is there also says that the unzip tasks are done: it is first written after them.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import attrs

CHECKPOINT_FILE = "wrapper_checkpoint.txt"


@attrs.frozen
class Checkpoint:
    """What a restarted wrapper must know."""

    tasks_done: int = 0
    cpu_s: float = 0.0
    run_time_s: float = 0.0


def read_checkpoint(slot: Path) -> Checkpoint | None:
    """The last checkpoint, or None when there is none that can be read (the job then begins anew)."""
    try:
        words = (slot / CHECKPOINT_FILE).read_text("utf-8")[:200].split()
        done, cpu, run_time = int(words[0]), float(words[1]), float(words[2])
    except (OSError, ValueError, IndexError):
        return None
    if done < 0 or not all(math.isfinite(value) and value >= 0 for value in (cpu, run_time)):
        return None
    return Checkpoint(done, cpu, run_time)


def write_checkpoint(slot: Path, checkpoint: Checkpoint) -> None:
    """Replace the file at once: a crash leaves the old line or the new one, on the disk."""
    line = f"{checkpoint.tasks_done} {checkpoint.cpu_s:.6f} {checkpoint.run_time_s:.6f}\n"
    write_atomically(slot / CHECKPOINT_FILE, line)


def write_atomically(path: Path, text: str, durable: bool = True) -> None:
    """Write a small file so that a reader sees all of it or none; `durable`: also after a power cut."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)
