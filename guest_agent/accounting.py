"""What a program uses together with everything that it starts: the interface, and its two forms on Linux.

The keeper opens an account before it starts a program and tells the agent the account's `place`; the agent, which is
another process and may be a later one, finds the account there and looks at it while the program runs. At the end the
keeper takes the account's total, or where that has a gap what `wait4` says, whichever is more.

    Linux with a cgroup v2 of ours    exact, whole tree, also of orphans             place: the group's directory
    other Unix                        the tree as /proc shows it, and `wait4`        place: empty
    Windows                           a job object counts (user and kernel time)     place: the job object's name

A new form is a class with the methods of `Accounts`, and a line in `accounts()`. Standard library only: the keeper
is started before anything else is imported.
"""

from __future__ import annotations

import contextlib
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol


class Used(NamedTuple):
    """Of a program and everything that it started, ended or not."""

    user_s: float = 0.0
    system_s: float = 0.0
    rss_bytes: int = 0  # resident now; 0 when it is not known, or nothing runs any more

    @property
    def cpu_s(self) -> float:
        return self.user_s + self.system_s


class Account(Protocol):
    """One program's. No method raises: an account that cannot be read has used nothing."""

    place: str  # where `Accounts.find` finds it again; empty: by the program's pid alone

    def starting(self) -> AbstractContextManager[None]:
        """What the calling process starts inside of this context is counted from its first instruction on."""

    def started(self, pid: int) -> None:
        """The program runs, as this process. (For a form that takes a process in only when it is there.)"""

    def used(self) -> Used:
        """So far. May go down by a little when a process ends between two looks; callers keep the most."""

    def close(self) -> None:
        """The program has ended and its total was taken. Called again later, for what could not be removed at once."""


class Accounts(Protocol):
    """One form of counting."""

    def open(self, command: str) -> Account:
        """A new account for a command that is about to be started; `command` is its id: letters, digits, `-._`."""

    def find(self, place: str, pid: int) -> Account:
        """The account of a program that another process of ours has started."""


def accounts(proc: Path = Path("/proc")) -> Accounts:
    """The best form for this system."""
    if sys.platform == "linux":
        from common.cgroup import own_group

        home = own_group()
        if home is not None and os.access(home.parent / "cgroup.procs", os.W_OK):
            return CgroupAccounts(home, home.parent, ProcessAccounts(proc))
    if os.name == "nt":
        return JobAccounts()
    return ProcessAccounts(proc)


class JobAccounts:
    """A job object of Windows for each program; it is made by whoever starts the program (`direct.py`)."""

    def open(self, command: str) -> Account:
        return JobAccount(f"Local\\vmwrapper-{os.getpid()}-{command}")

    def find(self, place: str, pid: int) -> Account:
        return JobAccount(place)


class JobAccount:
    """`place` is the job object's name."""

    def __init__(self, place: str) -> None:
        self.place = place

    def starting(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def started(self, pid: int) -> None:
        pass  # it was put into the job before its first instruction

    def used(self) -> Used:
        from common.windows_job import Job

        try:
            job = Job(self.place, existing=True)
        except OSError:
            return Used()  # it is closed when the program's end was told
        try:
            return Used(*job.cpu_times(), job.resident_bytes())
        finally:
            job.close()

    def close(self) -> None:
        pass


class CgroupAccounts:
    """A control group for each program, below `parent`; `home` is the group that the calling process is in."""

    def __init__(self, home: Path, parent: Path, otherwise: Accounts) -> None:
        self._home = home
        self._parent = parent
        self._otherwise = otherwise

    def open(self, command: str) -> Account:
        from common.cgroup import TaskGroup

        group = TaskGroup.make(f"task-{command}", self._parent)
        return self._otherwise.open(command) if group is None else CgroupAccount(group.path, self._home)

    def find(self, place: str, pid: int) -> Account:
        return CgroupAccount(Path(place), self._home) if place else self._otherwise.find(place, pid)


class CgroupAccount:
    """An `Account`."""

    def __init__(self, path: Path, home: Path) -> None:
        from common.cgroup import TaskGroup

        self._group = TaskGroup(path)
        self._home = home
        self.place = str(path)

    def starting(self) -> AbstractContextManager[None]:
        return self._group.entered(self._home)

    def started(self, pid: int) -> None:
        pass

    def used(self) -> Used:
        user_s, system_s = self._group.cpu_times() or (0.0, 0.0)
        return Used(user_s, system_s, sum(_Stat.of(pid).rss_bytes for pid in self._group.processes()))

    def close(self) -> None:
        self._group.remove()  # with an orphan in it, it stays


class ProcessAccounts:
    """Processes as /proc shows them: what is alive below the program, and what it has waited for."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc

    def open(self, command: str) -> Account:
        return ProcessAccount(self._proc)

    def find(self, place: str, pid: int) -> Account:
        account = ProcessAccount(self._proc)
        account.started(pid)
        return account


class ProcessAccount:
    """An `Account`. The time of a child whose parent did not wait for it is lost when that child ends."""

    place = ""

    def __init__(self, proc: Path) -> None:
        self._proc = proc
        self._pid = 0

    def starting(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def started(self, pid: int) -> None:
        self._pid = pid

    def used(self) -> Used:
        user_s = system_s = 0.0
        rss = 0
        left, seen = [self._pid] if self._pid else [], set[int]()
        while left and len(seen) < MOST_PROCESSES:
            pid = left.pop()
            if pid in seen:
                continue
            seen.add(pid)
            stat = _Stat.of(pid, self._proc)
            user_s, system_s, rss = user_s + stat.user_s, system_s + stat.system_s, rss + stat.rss_bytes
            left += _children(pid, self._proc)
        return Used(user_s, system_s, rss)

    def close(self) -> None:
        pass


MOST_PROCESSES = 1000  # of one program, that are looked at


class _Stat(NamedTuple):
    """A process of /proc: its own times with those of the children that it has waited for."""

    user_s: float = 0.0
    system_s: float = 0.0
    rss_bytes: int = 0

    @classmethod
    def of(cls, pid: int, proc: Path = Path("/proc")) -> _Stat:
        try:
            fields = (proc / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
            user, system, waited_user, waited_system = (int(field) / _CLOCK_TICKS for field in fields[11:15])
            return cls(user + waited_user, system + waited_system, int(fields[21]) * _PAGE)
        except (OSError, ValueError, IndexError):
            return cls()


def _children(pid: int, proc: Path) -> list[int]:
    try:
        threads = list((proc / str(pid) / "task").iterdir())
        return [int(child) for thread in threads for child in (thread / "children").read_bytes().split()]
    except (OSError, ValueError):  # gone meanwhile, or a kernel without these lists
        return []


_CLOCK_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
