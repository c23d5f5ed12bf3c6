"""A control group (cgroup v2) of a task's own, where we may make one: the kernel then counts CPU time without a gap.

On the host most volunteers' clients may not: systemd gives a service's groups to root, unless it *delegates* them.
In the guests that we build the init delegates one to the agent. The standard library alone is imported here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


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

    @contextlib.contextmanager
    def entered(self, home: Path) -> Iterator[None]:
        """What the calling process starts meanwhile is in the group; afterwards it is back in its `home`."""
        entered = self.enter()
        try:
            yield
        finally:
            if entered:
                TaskGroup(home).enter()

    def cpu_times(self) -> tuple[float, float] | None:
        """User and system seconds of everything that ever ran in it."""
        try:
            lines = (line.partition(" ") for line in (self.path / "cpu.stat").read_text().splitlines())
            values = {name: int(value) for name, _, value in lines if name in ("user_usec", "system_usec")}
            return values["user_usec"] / 1e6, values["system_usec"] / 1e6
        except (OSError, ValueError, KeyError):
            return None

    def cpu_seconds(self) -> float | None:
        """Both together."""
        times = self.cpu_times()
        return None if times is None else sum(times)

    def processes(self) -> list[int]:
        """The processes that are in it now."""
        try:
            return [int(line) for line in (self.path / "cgroup.procs").read_text().split()]
        except (OSError, ValueError):
            return []

    def remove(self) -> None:
        """Remove it; while something still runs in it, it stays."""
        with contextlib.suppress(OSError):
            self.path.rmdir()
