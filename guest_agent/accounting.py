"""What a program uses together with everything that it starts: the interface, and its two forms on Linux.

The keeper opens an account before it starts a program and tells the agent the account's `place`; the agent, which is
another process and may be a later one, finds the account there and looks at it while the program runs. At the end the
keeper takes the account's total, or where that has a gap what `wait4` says, whichever is more.

    Linux with a cgroup v2 of ours    exact, whole tree, also of orphans             place: the group, what ran before
    other Unix                        the tree as /proc shows it, and `wait4`        place: empty
    Windows                           a job object counts (user and kernel time)     place: the job object's name

A new form is a class with the methods of `Accounts`, and a line in `accounts()`. Standard library only: the keeper
is started before anything else is imported.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

from common.cgroup import PROCS, cpu_times, own_group


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

    def total(self) -> Used:
        """When the program has ended: the same, without what is resident."""

    def close(self) -> None:
        """The program has ended and its total was taken. Called again later, for what could not be removed at once."""


class Accounts(Protocol):
    """One form of counting."""

    def prepare(self) -> None:
        """There is time now for what the next `open` can do without."""

    def open(self, command: str) -> Account:
        """A new account for a command that is about to be started; `command` is its id: letters, digits, `-._`."""

    def find(self, place: str, pid: int) -> Account:
        """The account of a program that another process of ours has started."""

    def close(self) -> None:
        """Nothing is opened any more: what was prepared goes."""


def accounts(proc: Path = Path("/proc")) -> Accounts:
    """The best form for this system."""
    if sys.platform == "linux":
        home = own_group()
        if home is not None and os.access(home.parent / PROCS, os.W_OK):
            return CgroupAccounts(home, home.parent, ProcessAccounts(proc))
    if os.name == "nt":
        return JobAccounts()
    return ProcessAccounts(proc)


class JobAccounts:
    """A job object of Windows for each program; it is made by whoever starts the program (`direct.py`)."""

    def prepare(self) -> None:
        pass

    def open(self, command: str) -> Account:
        return JobAccount(f"Local\\vmwrapper-{os.getpid()}-{command}")

    def find(self, place: str, pid: int) -> Account:
        return JobAccount(place)

    def close(self) -> None:
        pass


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

    def total(self) -> Used:
        return self.used()

    def close(self) -> None:
        pass


class CgroupAccounts:
    """A control group for each program, below `parent`; `home` is the group that the calling process is in.

    Plain system calls on plain names: what `pathlib` and text files add around them is most of what an account costs
    a short program in an emulated machine. To make and to remove a group is most of the rest, so a group in which
    nothing runs any more is the next program's.
    """

    def __init__(self, home: Path, parent: Path, otherwise: Accounts) -> None:
        self._home = home
        self._parent = str(parent)
        self._otherwise = otherwise
        self._way_home = -1  # its cgroup.procs, open
        self._counts: bool | None = None  # that a group of ours tells what it used; not known yet
        self._made = 0
        self._spare: CgroupAccount | None = None

    def prepare(self) -> None:
        """Have a group for the next program: to make one is a part of what a short program waits for."""
        if self._spare is None:
            self._spare = self._make()

    def open(self, command: str) -> Account:
        self.prepare()
        account, self._spare = self._spare, None
        return self._otherwise.open(command) if account is None else account

    def close(self) -> None:
        if self._spare is not None:
            self._spare.remove()
            self._spare = None

    def take_back(self, group: str) -> bool:
        """A program has ended in this group: whether the next may have it."""
        if self._spare is not None:
            return False
        way_in = -1
        try:
            way_in = os.open(f"{group}/{PROCS}", os.O_RDWR | os.O_CLOEXEC)
            used = os.read(way_in, 1) or os.stat(group).st_nlink > _WITHOUT_GROUPS  # noqa: PTH116
            before = None if used else cpu_times(group)
        except OSError:
            before = None
        if before is not None:
            self._spare = CgroupAccount(group, before, self, way_in, self._way_home)
        elif way_in >= 0:
            os.close(way_in)  # an orphan is in it, or a group that the program has made
        return before is not None

    def _make(self) -> CgroupAccount | None:
        if self._counts is False:
            return None
        self._made += 1
        place = f"{self._parent}/task-{os.getpid()}-{self._made}"
        try:
            os.mkdir(place)  # noqa: PTH102
            if self._way_home < 0:
                self._way_home = os.open(self._home / PROCS, os.O_WRONLY | os.O_CLOEXEC)
            way_in = os.open(f"{place}/{PROCS}", os.O_WRONLY | os.O_CLOEXEC)
        except FileExistsError:
            return None  # an earlier keeper's, with an orphan in it
        except OSError:
            _remove(place)
            if self._counts is None:
                self._counts = False  # what we may not do once is not tried for each program
            return None
        account = CgroupAccount(place, (0.0, 0.0), self, way_in, self._way_home)
        if self._counts is None:
            self._counts = cpu_times(place) is not None
        if not self._counts:
            account.remove()
            return None
        return account

    def find(self, place: str, pid: int) -> Account:
        if not place:
            return self._otherwise.find(place, pid)
        group, *before = place.rsplit(" ", 2)
        if len(before) < 2:  # of a keeper from before groups were used again, which outlives an agent that is replaced
            return CgroupAccount(place, (0.0, 0.0))
        return CgroupAccount(group, (float(before[0]), float(before[1])))


class CgroupAccount:
    """An `Account`. `before`: seconds, user's and system's, of what ran in the group before.

    `way_in` and `way_home`: files of the two groups into which a process writes itself.
    """

    def __init__(
        self,
        group: str,
        before: tuple[float, float],
        form: CgroupAccounts | None = None,
        way_in: int = -1,
        way_home: int = -1,
    ) -> None:
        self.place = f"{group} {before[0]} {before[1]}"
        self._group = group
        self._before = before
        self._form = form
        self._way_in = way_in
        self._way_home = way_home

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        try:
            os.write(self._way_in, b"0")
            entered = True
        except OSError:
            entered = False
        try:
            yield
        finally:
            if entered:
                with contextlib.suppress(OSError):
                    os.write(self._way_home, b"0")
            self._close_way_in()

    def started(self, pid: int) -> None:
        pass

    def used(self) -> Used:
        used = self.total()
        try:
            with open(f"{self._group}/{PROCS}", "rb") as file:  # noqa: PTH123
                pids = [int(line) for line in file]
        except (OSError, ValueError):
            pids = []
        return Used(used.user_s, used.system_s, sum(_Stat.of(pid).rss_bytes for pid in pids))

    def total(self) -> Used:
        user_s, system_s = cpu_times(self._group) or self._before
        return Used(user_s - self._before[0], system_s - self._before[1])

    def close(self) -> None:
        form, self._form = self._form, None
        if form is not None and form.take_back(self._group):
            self._group = ""  # it is another's now
        self.remove()

    def remove(self) -> None:
        """Close it, and let nobody have the group."""
        self._close_way_in()
        _remove(self._group)

    def _close_way_in(self) -> None:
        if self._way_in >= 0:
            os.close(self._way_in)
            self._way_in = -1


_WITHOUT_GROUPS = 2  # links of a directory that has none in it


def _remove(group: str) -> None:
    """With an orphan in it, it stays."""
    with contextlib.suppress(OSError):
        os.rmdir(group)  # noqa: PTH106


class ProcessAccounts:
    """Processes as /proc shows them: what is alive below the program, and what it has waited for."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc

    def prepare(self) -> None:
        pass

    def open(self, command: str) -> Account:
        return ProcessAccount(self._proc)

    def find(self, place: str, pid: int) -> Account:
        account = ProcessAccount(self._proc)
        account.started(pid)
        return account

    def close(self) -> None:
        pass


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

    def total(self) -> Used:
        return Used()  # it is not in /proc any more; `wait4` has told what it waited for

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
