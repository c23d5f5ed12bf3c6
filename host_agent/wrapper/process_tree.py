"""Processes and their descendants, as the operating system lists them: who belongs to a task, and its CPU time.

A task's *leader* (`host_leader.py`) is the ancestor of everything that the task starts: on Linux also of what was
orphaned or made a session of its own, because the leader is the reaper of its descendants.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class ProcessStat(NamedTuple):
    """What `/proc/PID/stat` says of one process."""

    pid: int
    state: str  # R, S, D, T (stopped), Z (ended, not yet reaped) …
    parent: int
    group: int
    session: int
    cpu_s: float  # its own, user and system; a zombie's too
    reaped_s: float  # of those of its children that it has waited for, with theirs
    start: str  # clock ticks after the boot

    @property
    def alive(self) -> bool:
        return self.state not in "ZX"


def read_stat(pid: int) -> ProcessStat | None:
    """One process, or None when it is gone (or there is no /proc)."""
    try:
        return stat_of(pid)
    except (OSError, IndexError, ValueError):
        return None


def stat_of(pid: int) -> ProcessStat:
    """One process. OSError says why it cannot be read; IndexError and ValueError: it is not as Linux writes it."""
    if sys.platform == "win32":  # what a program under wine sees there are processes of the system below it
        raise FileNotFoundError(PROC)
    with open(f"{PROC}/{pid}/stat", "rb") as file:  # noqa: PTH123 - a third of the time of Path.open
        text = file.read()
    fields = text.rpartition(b")")[2].split()
    tick = os.sysconf("SC_CLK_TCK")
    return ProcessStat(
        pid=pid,
        state=fields[0].decode("ascii"),
        parent=int(fields[1]),
        group=int(fields[2]),
        session=int(fields[3]),
        cpu_s=(int(fields[11]) + int(fields[12])) / tick,
        reaped_s=(int(fields[13]) + int(fields[14])) / tick,
        start=fields[19].decode("ascii"),
    )


def all_processes() -> list[ProcessStat]:
    """Everything that runs; empty where there is no /proc."""
    try:
        names = os.listdir(PROC)  # noqa: PTH208 - half the time of Path.iterdir over hundreds of processes
    except OSError:
        return []
    found = (read_stat(int(name)) for name in names if name.isdecimal())
    return [each for each in found if each is not None]


def descendants(root: int) -> list[ProcessStat]:
    """All processes below `root`, zombies included, `root` itself not."""
    if not (PROC / "self").exists():
        return _psutil_descendants(root)
    children: dict[int, list[ProcessStat]] = {}
    for each in all_processes():
        children.setdefault(each.parent, []).append(each)
    found: list[ProcessStat] = []
    waiting = [root]
    while waiting:
        below = children.pop(waiting.pop(), [])
        found += below
        waiting += [each.pid for each in below]
    return found


def tree_cpu_seconds(leader: int) -> float:
    """CPU time of everything below a leader: what runs, and what has ended and was waited for by anyone in the tree.

    The leader reaps the orphans, so their time shows in the leader's own entry. Only children whose parent *ignores*
    SIGCHLD vanish without a trace; a control group counts those too (`cgroup.py`).
    """
    own = read_stat(leader)  # first: what it reaps meanwhile may be missed until the next look, but not counted twice
    below = _walk(leader) if (PROC / "self").exists() else None
    if below is None:
        below = descendants(leader)
    return (own.reaped_s if own else 0.0) + sum(each.cpu_s + each.reaped_s for each in below)


def _walk(root: int) -> list[ProcessStat] | None:
    """Most of the descendants, at a hundredth of the price: by the kernel's own lists of children, where it has them.

    Such a list may miss a child while another one ends, so this is for counting, not for ending a tree.
    """
    found: list[ProcessStat] = []
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        try:
            threads = os.listdir(f"{PROC}/{pid}/task")  # noqa: PTH208 - as above
        except OSError:
            continue  # it has ended
        for thread in threads:
            try:
                with open(f"{PROC}/{pid}/task/{thread}/children", "rb") as file:  # noqa: PTH123 - as above
                    children = [int(word) for word in file.read().split()]
            except FileNotFoundError:
                if pid == root and (PROC / str(root)).exists():
                    return None  # a kernel without such lists
                continue
            except OSError:
                continue
            waiting += children
            found += [each for each in map(read_stat, children) if each is not None]
    return found


def session_members(session: int) -> list[ProcessStat]:
    """All processes of a session, also when the process that made it has ended."""
    return [each for each in all_processes() if each.session == session]


def is_below(pid: int, root: int) -> bool:
    """Whether a process is `root` or one of its descendants."""
    return pid == root or any(each.pid == pid for each in descendants(root))


def signal_each(pids: Iterable[int], number: int) -> None:
    """Signal processes, whether or not they are still there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            pass  # gone, or a set-user-id program that is not ours to signal


def signal_all(members: Callable[[], Iterable[ProcessStat]], number: int) -> None:
    """Signal a tree until a look finds nobody new: a process can fork between the look and its signal."""
    done: set[int] = set()
    for _look in range(20):
        fresh = [each.pid for each in members() if each.alive and each.pid not in done]
        if not fresh:
            return
        signal_each(fresh, number)
        done.update(fresh)


def kill_all(members: Callable[[], Iterable[ProcessStat]]) -> None:
    """Kill a tree, parents and children alike."""
    signal_all(members, signal.SIGKILL)


def _psutil_descendants(root: int) -> list[ProcessStat]:
    """The same where there is no /proc (macOS)."""
    import psutil

    found = []
    try:
        for each in psutil.Process(root).children(recursive=True):
            try:
                times, state = each.cpu_times(), "Z" if each.status() == psutil.STATUS_ZOMBIE else "S"
                pid = each.pid
                cpu_s = times.user + times.system
                found.append(
                    ProcessStat(
                        pid, state, each.ppid(), os.getpgid(pid), os.getsid(pid), cpu_s, 0.0, str(each.create_time())
                    )
                )
            except (psutil.Error, OSError):
                continue  # it ended while we looked
    except psutil.Error:
        pass
    return found
