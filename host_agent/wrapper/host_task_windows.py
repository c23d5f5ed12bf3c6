"""Processes on Windows: a job object with all that a program starts, and a thread that waits for its end.

Elsewhere, for tests, the tree is what psutil sees of it, and nothing else is different.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import subprocess
import threading
from collections.abc import Callable

import psutil

from common.windows_job import Job, start_in

from .host_task import ExitStatus, ProcessSpec

# Named here because the modules of other systems lack them.
CREATE_NO_WINDOW = 0x08000000
PRIORITY_CLASS = {1: 0x40, 2: 0x4000, 3: 0x20, 4: 0x8000, 5: 0x80}  # idle, below normal, normal, above normal, high
END_DEADLINE_S = 10.0
_NOT_MINE = (psutil.NoSuchProcess, psutil.AccessDenied)


class WindowsProcess:
    """A program with everything that it starts."""

    def __init__(self, spec: ProcessSpec, flags: int = CREATE_NO_WINDOW) -> None:
        if flags and spec.priority:
            flags |= PRIORITY_CLASS[spec.priority]
        with spec.open_files() as (stdin, stdout, stderr):
            files = (stdin, stdout, stderr)
            self._job: Job | None = None
            if flags:
                self._job = Job()
                self._popen = self._start(spec, self._job, files, flags)
            else:
                self._popen = subprocess.Popen(
                    spec.argv, stdin=stdin, stdout=stdout, stderr=stderr, cwd=spec.directory, env=spec.environment
                )
        self.pid = self._popen.pid
        self._root: psutil.Process | None = None  # it may have ended already
        self._seen: dict[tuple[int, float], float] = {}  # CPU seconds of every process that was ever looked at
        with contextlib.suppress(*_NOT_MINE):
            self._root = psutil.Process(self.pid)
            if flags and spec.priority:
                self._root.nice(PRIORITY_CLASS[spec.priority])  # not every system minds the flag
        self._status: ExitStatus | None = None
        self._counted = 0.0  # CPU seconds of the job object, which is closed at the end
        self._bell, self._ringer = socket.socketpair()
        threading.Thread(target=self._wait, name=f"end of {self.pid}", daemon=True).start()

    @staticmethod
    def _start(spec: ProcessSpec, job: Job, files: tuple[int, int, int], flags: int) -> subprocess.Popen[bytes]:
        try:
            return start_in(
                job, spec.argv, cwd=str(spec.directory), environment=spec.environment, files=files, flags=flags
            )
        except ValueError as error:
            job.close()
            raise OSError(errno.EINVAL, str(error)) from None
        except OSError:
            job.close()
            raise

    def _wait(self) -> None:
        self._popen.wait()
        with contextlib.suppress(OSError):
            self._ringer.send(b"!")

    def fileno(self) -> int:
        return self._bell.fileno()

    def receive(self) -> None:
        """Nothing to read: the bell rings once, at the end."""

    def poll(self) -> ExitStatus | None:
        if self._status is None and self._popen.returncode is not None:
            self._look()
            self._count()
            self._count_root()
            self._status = ExitStatus(self._popen.returncode)
            self._kill_tree()
        return self._status

    def suspend(self) -> None:
        self._each(psutil.Process.suspend)

    def resume(self) -> None:
        self._each(psutil.Process.resume)

    def terminate(self) -> None:
        """Windows knows no polite way for a program without a window."""
        self._each(psutil.Process.terminate)

    def kill(self) -> None:
        self._look()
        self._count()
        self._kill_tree()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(END_DEADLINE_S)
        if self._status is None:
            self._count_root()
            self._status = ExitStatus(self._popen.returncode or 0, "SIGKILL")

    def close(self) -> None:
        if self._job is not None:
            self._job.close()
        self._bell.close()
        self._ringer.close()

    def contains(self, pid: int) -> bool:
        return any(each.pid == pid for each in self._tree())

    def cpu_seconds(self) -> float:
        """Of all that ever ran in the job object. Without one, of everything that was ever seen."""
        if self._status is None:
            self._look()
        self._count()
        return max(self._counted, sum(self._seen.values()))

    def _count(self) -> None:
        if self._job is not None:
            self._counted = max(self._counted, sum(self._job.cpu_times()))

    def _look(self) -> None:
        for process in self._tree():
            with contextlib.suppress(*_NOT_MINE):
                times = process.cpu_times()
                self._seen[process.pid, process.create_time()] = times.user + times.system

    def _count_root(self) -> None:
        """After its end psutil says nothing of the program any more, but Windows does."""
        if self._root is not None:
            key = self.pid, self._root.create_time()
            self._seen[key] = max(self._seen.get(key, 0.0), ended_cpu_seconds(self._popen))

    def _tree(self) -> list[psutil.Process]:
        if self._job is not None:
            return [each for each in map(_process, self._job.processes()) if each is not None]
        if self._root is None:
            return []
        try:
            below = self._root.children(recursive=True)
        except _NOT_MINE:
            below = []
        return [self._root, *below]

    def _each(self, call: Callable[[psutil.Process], None]) -> None:
        for process in self._tree():
            with contextlib.suppress(*_NOT_MINE):
                call(process)

    def _kill_tree(self) -> None:
        if self._job is not None:
            self._job.terminate()
            return
        for _look in range(5):  # one may have been started while we looked
            self._each(psutil.Process.kill)
            _gone, alive = psutil.wait_procs(self._tree()[1:], timeout=1)
            if not alive:
                return


def ended_cpu_seconds(popen: subprocess.Popen[bytes]) -> float:
    """CPU time of a process that may have ended, from its handle; 0 on another system."""
    import ctypes

    system = getattr(ctypes, "windll", None)
    if system is None:
        return 0.0
    times = (ctypes.c_ulonglong * 4)()  # creation, exit, kernel, user; in 100 ns
    handle = ctypes.c_void_p(int(getattr(popen, "_handle")))  # noqa: B009 - a name that only Windows has
    if not system.kernel32.GetProcessTimes(handle, *(ctypes.byref(times, 8 * index) for index in range(4))):
        return 0.0
    return float(times[2] + times[3]) / 1e7


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.Error:
        return None  # it has ended just now
