"""A job object of Windows: a program with everything that it starts, counted, suspended and ended as one.

Only `ctypes` is used. The module can be imported on any system; `Job` works on Windows alone.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

CREATE_SUSPENDED = 0x4
CREATE_NO_WINDOW = 0x08000000
_KILL_ON_CLOSE = 0x2000
_LIMITS, _ACCOUNTING, _PROCESSES = 9, 1, 3  # what is set or asked
_SUSPEND_RESUME, _QUERY = 0x0800, 0x1000  # rights to a process
_ALL_OF_A_JOB = 0x1F001F
_MOST_PROCESSES = 1024
_TICK = 1e-7  # seconds


class _Limits(ctypes.Structure):
    _fields_ = (
        ("times", ctypes.c_int64 * 2),
        ("flags", ctypes.c_uint32),
        ("working_set", ctypes.c_size_t * 2),
        ("active_processes", ctypes.c_uint32),
        ("affinity", ctypes.c_size_t),
        ("classes", ctypes.c_uint32 * 2),
        ("io", ctypes.c_uint64 * 6),
        ("memory", ctypes.c_size_t * 4),
    )


class _Accounting(ctypes.Structure):
    _fields_ = (
        ("user", ctypes.c_int64),
        ("kernel", ctypes.c_int64),
        ("of_this_period", ctypes.c_int64 * 2),
        ("page_faults", ctypes.c_uint32),
        ("processes", ctypes.c_uint32),
        ("active", ctypes.c_uint32),
        ("terminated", ctypes.c_uint32),
    )


class _Processes(ctypes.Structure):
    _fields_ = (
        ("assigned", ctypes.c_uint32),
        ("listed", ctypes.c_uint32),
        ("pids", ctypes.c_size_t * _MOST_PROCESSES),
    )


def _kernel() -> Any:
    return ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined]


def _error() -> OSError:
    error: OSError = ctypes.WinError(ctypes.get_last_error())  # type: ignore[attr-defined]
    return error


class Job:
    """One job object. When its last handle is closed, what runs in it is ended: also when we are killed."""

    def __init__(self, name: str = "", existing: bool = False) -> None:
        kernel = _kernel()
        kernel.CreateJobObjectW.restype = kernel.OpenJobObjectW.restype = ctypes.c_void_p
        if existing:
            self._handle = kernel.OpenJobObjectW(_ALL_OF_A_JOB, False, ctypes.c_wchar_p(name))
        else:
            self._handle = kernel.CreateJobObjectW(None, ctypes.c_wchar_p(name) if name else None)
        if not self._handle:
            raise _error()
        if not existing:
            limits = _Limits(flags=_KILL_ON_CLOSE)
            kernel.SetInformationJobObject(self._this, _LIMITS, ctypes.byref(limits), ctypes.sizeof(limits))

    @property
    def _this(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._handle)

    def take(self, process_handle: int) -> None:
        """Put a process into it. Raises OSError."""
        if not _kernel().AssignProcessToJobObject(self._this, ctypes.c_void_p(process_handle)):
            raise _error()

    def cpu_times(self) -> tuple[float, float]:
        """User and kernel seconds of all that ever ran in it."""
        told = _Accounting()
        self._ask(_ACCOUNTING, told)
        if told.user or told.kernel:
            return told.user * _TICK, told.kernel * _TICK
        # wine keeps no accounts of a job; what its processes have used so far is better than nothing.
        times = [_of_process(pid, _times) for pid in self.processes()]
        return sum(user for user, _ in times), sum(kernel for _, kernel in times)

    def processes(self) -> list[int]:
        """What runs in it now."""
        told = _Processes()
        self._ask(_PROCESSES, told)
        return [int(pid) for pid in told.pids[: min(told.listed, _MOST_PROCESSES)]]

    def resident_bytes(self) -> int:
        """Of what runs in it now."""
        return sum(_of_process(pid, _resident) for pid in self.processes())

    def _ask(self, what: int, told: ctypes.Structure) -> None:
        if self._handle:
            size = ctypes.sizeof(told)
            _kernel().QueryInformationJobObject(self._this, what, ctypes.byref(told), size, None)

    def suspend(self) -> None:
        """Let everything in it stand still."""
        for pid in self.processes():
            _of_process(pid, lambda process: _resume(process, "NtSuspendProcess"))

    def resume(self) -> None:
        for pid in self.processes():
            _of_process(pid, _resume)

    def terminate(self) -> None:
        """End everything in it at once."""
        if self._handle:
            _kernel().TerminateJobObject(self._this, 1)

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle:
            _kernel().CloseHandle(ctypes.c_void_p(handle))


def _of_process(pid: int, what: Callable[[int], Any]) -> Any:
    """Ask something of a process; what is asked gets 0, which is no process, when it has ended just now."""
    kernel = _kernel()
    kernel.OpenProcess.restype = ctypes.c_void_p
    handle = kernel.OpenProcess(_SUSPEND_RESUME | _QUERY, False, pid) or 0
    try:
        return what(int(handle))
    finally:
        if handle:
            kernel.CloseHandle(ctypes.c_void_p(handle))


def _times(process_handle: int) -> tuple[float, float]:
    times = (ctypes.c_uint64 * 4)()  # creation, exit, kernel, user
    places = [ctypes.byref(times, 8 * index) for index in range(4)]
    _kernel().GetProcessTimes(ctypes.c_void_p(process_handle), *places)
    return times[3] * _TICK, times[2] * _TICK


class _Memory(ctypes.Structure):
    _fields_ = (("size", ctypes.c_uint32), ("faults", ctypes.c_uint32), ("bytes", ctypes.c_size_t * 8))


def _resident(process_handle: int) -> int:
    told = _Memory(size=ctypes.sizeof(_Memory))
    _kernel().K32GetProcessMemoryInfo(ctypes.c_void_p(process_handle), ctypes.byref(told), told.size)
    return int(told.bytes[1])  # after the peak: the working set


def _resume(process_handle: int, call: str = "NtResumeProcess") -> None:
    getattr(ctypes.WinDLL("ntdll"), call)(ctypes.c_void_p(process_handle))  # type: ignore[attr-defined]


def start_in(
    job: Job,
    argv: Sequence[str],
    *,
    cwd: str,
    environment: Mapping[str, str] | None,
    files: tuple[Any, Any, Any],
    flags: int = 0,
) -> subprocess.Popen[bytes]:
    """Start a program in a job: nothing of it runs before it is in there. Raises OSError."""
    stdin, stdout, stderr = files
    process = subprocess.Popen(
        command_line(argv),
        cwd=cwd,
        env=environment,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        creationflags=flags | CREATE_NO_WINDOW | CREATE_SUSPENDED,
    )
    handle = int(process._handle)  # type: ignore[attr-defined]
    try:
        job.take(handle)
    except OSError:
        process.kill()
        process.wait()
        raise
    _resume(handle)
    return process


def ended_times(process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """User and kernel seconds of a process that has ended, from the handle that its parent has; 0 on other systems."""
    handle = getattr(process, "_handle", None)
    return _times(int(handle)) if handle is not None else (0.0, 0.0)


def command_line(argv: Sequence[str]) -> str:
    """The line from which a program of Windows makes its words again.

    A batch file has no words but a line for `cmd.exe`, which looks for its own signs even in it. So all words are put
    in quotes, where it looks for `%` only, and a word that would end the quotes is refused with ValueError.
    """
    if not argv[0].lower().endswith((".bat", ".cmd")):
        return subprocess.list2cmdline(argv)
    for word in argv:
        if set(word) & set('"%\r\n'):
            raise ValueError(f"a batch file cannot be given the word {word!r}")
    quoted = " ".join(f'"{word}"' for word in argv)
    interpreter = os.environ.get("COMSPEC", "cmd.exe")
    # /s: of what follows /c, the outer quotes are taken away and nothing else. /d: no commands of the registry.
    return f'{subprocess.list2cmdline([interpreter])} /d /s /c "{quoted}"'
