"""CPU time of processes that run, to the nanosecond; psutil counts in ticks of 10 ms."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def cpu_seconds(pids: Iterable[int]) -> float:
    """Of all their threads so far; a thread that ended meanwhile, and children, do not count."""
    files = [file for pid in pids for file in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(map(_ran_ns, files)) / 1e9


def _ran_ns(file: Path) -> int:
    try:
        return int(file.read_text().split()[0])
    except (FileNotFoundError, ProcessLookupError):  # it has ended since it was listed, as threads of Java do
        return 0
