"""A control group (cgroup v2) of a task's own, where we may make one: the kernel then counts CPU time without a gap.

Most volunteers' clients may not: systemd gives a service's groups to root, unless it *delegates* them.
Then `process_tree.py` counts.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import attrs


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


@attrs.frozen
class TaskGroup:
    """One task's group."""

    path: Path

    @classmethod
    def make(cls, name: str, parent: Path | None = None) -> TaskGroup | None:
        """A new group below our own, or None where that is not possible."""
        parent = parent or own_group()
        if parent is None:
            return None
        group = cls(parent / name)
        try:
            group.path.mkdir()
        except OSError:
            return None
        if group.cpu_seconds() is None or not os.access(group.path / "cgroup.procs", os.W_OK):
            group.remove()
            return None
        return group

    def enter(self) -> bool:
        """Move the calling process into it; its children follow. False when the system does not let us."""
        try:
            (self.path / "cgroup.procs").write_text("0")
        except OSError:
            return False
        return True

    def cpu_seconds(self) -> float | None:
        """User and system time of everything that ever ran in it."""
        try:
            for line in (self.path / "cpu.stat").read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "usage_usec":
                    return int(value) / 1e6
        except (OSError, ValueError):
            pass
        return None

    def remove(self) -> None:
        """Remove it; while something still runs in it, it stays."""
        with contextlib.suppress(OSError):
            self.path.rmdir()
