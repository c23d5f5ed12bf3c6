"""A control group (cgroup v2) of a task's own, where we may make one: the kernel then counts CPU time without a gap.

On the host most volunteers' clients may not: systemd gives a service's groups to root, unless it *delegates* them.
In the guests that we build the init delegates one to the agent. The standard library alone is imported here.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

PROCS = "cgroup.procs"


def own_group(mounts: Path = Path("/proc/self/mountinfo"), groups: Path = Path("/proc/self/cgroup")) -> Path | None:
    """The directory of the cgroup v2 that this process is in, or None."""
    try:
        path = next(line[3:] for line in groups.read_text().splitlines() if line.startswith("0::"))
        for line in mounts.read_text().splitlines():
            left, _, right = line.partition(" - ")
            if right.startswith("cgroup2 "):
                root, point = left.split()[3:5]
                below = os.path.relpath(path, root)
                return None if below.startswith("..") else Path(point) / below
    except (OSError, ValueError, StopIteration):
        pass
    return None


def cpu_times(group: str) -> tuple[float, float] | None:
    """User and system seconds of everything that ever ran in it; None where it does not tell.

    By plain system calls: it is asked for every short program of an emulated guest.
    """
    try:
        file = os.open(f"{group}/cpu.stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            words = os.read(file, 4096).split()
        finally:
            os.close(file)
        user, system = (int(words[words.index(name) + 1]) / 1e6 for name in (b"user_usec", b"system_usec"))
    except (OSError, ValueError, IndexError):
        return None
    return user, system


class TaskGroup:
    """One task's group."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def make(cls, name: str, parent: Path | None = None) -> TaskGroup | None:
        """A new group below our own (or below `parent`), or None where that is not possible."""
        parent = parent or own_group()
        if parent is None:
            return None
        group = cls(parent / name)
        try:
            group.path.mkdir()
        except OSError:
            return None
        if group.cpu_seconds() is None or not os.access(group.path / PROCS, os.W_OK):
            group.remove()
            return None
        return group

    def enter(self) -> bool:
        """Move the calling process into it; its children follow. False when the system does not let us."""
        try:
            (self.path / PROCS).write_text("0")
        except OSError:
            return False
        return True

    def cpu_times(self) -> tuple[float, float] | None:
        """User and system seconds of everything that ever ran in it."""
        return cpu_times(str(self.path))

    def cpu_seconds(self) -> float | None:
        """Both together."""
        times = self.cpu_times()
        return None if times is None else sum(times)

    def processes(self) -> list[int]:
        """The processes that are in it now."""
        try:
            return [int(line) for line in (self.path / PROCS).read_text().split()]
        except (OSError, ValueError):
            return []

    def remove(self) -> None:
        """Remove it; while something still runs in it, it stays."""
        with contextlib.suppress(OSError):
            self.path.rmdir()
