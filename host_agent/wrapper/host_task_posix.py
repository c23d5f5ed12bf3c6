"""Processes on Linux and macOS: a session of its own for every task, signalled and measured as a whole.

The only module that knows process groups, wait4 and /proc. One for Windows (a job object) goes beside it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .host_task import ExitStatus, ProcessSpec

_NICE = {1: 19, 2: 10, 3: 0, 4: -10, 5: -15}  # BOINC's process priorities
_PROC = Path("/proc")


class PosixProcess:
    """A program with everything that it starts. `keep_group`: its children may outlive it until `kill()`."""

    def __init__(self, spec: ProcessSpec, keep_group: bool = False) -> None:
        self._keep_group = keep_group
        self._cpu_s = 0.0
        self._status: ExitStatus | None = None
        self._reaped = False
        with spec.open_files() as (stdin, stdout, stderr):
            self._process = subprocess.Popen(
                spec.argv,
                executable=spec.program,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                cwd=spec.directory,
                env=spec.environment,
                start_new_session=True,
            )
        self.pid = self._process.pid
        if spec.priority:
            try:
                os.setpriority(os.PRIO_PGRP, self.pid, _NICE[spec.priority])
            except OSError:
                pass  # a higher priority than ours needs rights that a volunteer's account rarely has

    def poll(self) -> ExitStatus | None:
        """How the program ended, or None."""
        if self._status is None:
            # WNOWAIT leaves the process a zombie: its number stays ours, and no stranger's group gets our KILL.
            found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is None:
                return None
            if found.si_code == os.CLD_EXITED:
                self._status = ExitStatus(found.si_status)
            else:
                self._status = ExitStatus(0, _signal_name(found.si_status))
            if not self._keep_group:
                self._end_group()
        return self._status

    def suspend(self) -> None:
        """Stop the whole session."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let the whole session go on."""
        self._signal(signal.SIGCONT)

    def terminate(self) -> None:
        """Ask the whole session to end by itself."""
        self._signal(signal.SIGTERM)

    def contains(self, pid: int) -> bool:
        """Whether a process is of this session."""
        try:
            return not self._reaped and os.getsid(pid) == self.pid
        except OSError:
            return False

    def kill(self) -> None:
        """End the whole session and collect its status. Waits only for the kernel."""
        if not self._reaped:
            self._end_group()
            self.poll()

    def cpu_seconds(self) -> float:
        """CPU time of the session; exact once the program ended."""
        if not self._reaped:
            self._cpu_s = max(self._cpu_s, session_cpu_seconds(self.pid))
        return self._cpu_s

    def _signal(self, number: int) -> None:
        if not self._reaped:
            signal_session(self.pid, number)

    def _end_group(self) -> None:
        """Kill what is left of the session, then reap; until then the process number stays taken."""
        self._signal(signal.SIGKILL)
        _, status, usage = os.wait4(self.pid, 0)
        self._reaped = True
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self._cpu_s = max(self._cpu_s, usage.ru_utime + usage.ru_stime)
        if self._status is None:
            code = self._process.returncode
            self._status = ExitStatus(code) if code >= 0 else ExitStatus(0, _signal_name(-code))


def signal_session(session: int, number: int) -> None:
    """Send a signal to a task's process group, and to members of its session that made groups of their own."""
    try:
        os.killpg(session, number)
    except (ProcessLookupError, PermissionError):
        pass  # macOS says "not permitted" when only a zombie is left
    for pid, group, _cpu in _session_members(session):
        if group != session:
            try:
                os.kill(pid, number)
            except (ProcessLookupError, PermissionError):
                pass


def session_cpu_seconds(session: int) -> float:
    """CPU time of a session's processes and of those children that they waited for."""
    if sys.platform != "linux":
        return _tree_cpu_seconds(session)
    return sum((cpu for _pid, _group, cpu in _session_members(session)), 0.0)


def start_mark(pid: int) -> str:
    """Something that tells this process from a later one with the same number; empty where there is no /proc."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot}:{_stat_fields(pid)[19]}"
    except (OSError, IndexError):
        return ""


def kill_leftover(session: int, mark: str) -> bool:
    """End a session that an earlier wrapper left behind; False when the number belongs to somebody else."""
    boot = mark.partition(":")[0]
    current = start_mark(session)
    if not mark or (current and current != mark) or (not current and not start_mark(os.getpid()).startswith(boot)):
        return False
    members = [pid for pid, _group, _cpu in _session_members(session)]
    if not members:
        return False
    signal_session(session, signal.SIGKILL)
    return True


def _session_members(session: int) -> Iterator[tuple[int, int, float]]:
    """Process number, group and CPU seconds of each; nothing where there is no /proc."""
    try:
        names = os.listdir(_PROC)  # noqa: PTH208 - half the time of Path.iterdir over hundreds of processes
    except OSError:
        return
    tick = os.sysconf("SC_CLK_TCK")
    for name in names:
        if name.isdecimal():
            try:
                fields = _stat_fields(int(name))
                if int(fields[3]) == session and fields[0] != "Z":
                    yield int(name), int(fields[2]), sum(map(int, fields[11:15])) / tick
            except (OSError, IndexError, ValueError):
                continue  # it ended while we looked


def _stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on: 0 state, 2 group, 3 session, 11-14 CPU, 19 start."""
    text = (_PROC / str(pid) / "stat").read_text("utf-8", "replace")
    return text.rpartition(")")[2].split()


def _tree_cpu_seconds(pid: int) -> float:
    import psutil

    total = 0.0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            times = process.cpu_times()
            total += times.user + times.system
    except psutil.Error:
        pass
    return total


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
