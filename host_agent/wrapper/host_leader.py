"""The leader of a task on the host: a fork of the wrapper that starts the task's program and waits for its tree.

What the wrapper itself could not do: be the reaper of everything that the program starts, also of orphans and of
programs that make sessions of their own, so that none is lost sight of and every second of CPU time is counted;
and outlive the wrapper for the moment that it takes to end the tree, when the wrapper is killed.

    leader (session)                 group of its own: stopping the task does not stop it
      └─ the program (group)         not an orphaned group, so that SIGTSTP works
           └─ …

It tells the wrapper what happens in lines of JSON over a pipe: `{"pid": …}` or `{"errno": …, "file": …}`, and at the
end `{"code": …, "signal": …, "cpu_s": …}`. SIGUSR1 makes it end the tree.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

from common.cgroup import TaskGroup

from .process_tree import descendants, kill_all

END_TREE = signal.SIGUSR1
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class LeaderSpec(NamedTuple):
    """What a leader starts; the descriptors are open, and inherited by the fork."""

    program: str
    argv: Sequence[str]
    directory: str
    environment: Mapping[str, str] | None
    stdin: int
    stdout: int
    stderr: int
    nice: int | None
    keep_tree: bool  # what the program leaves behind may go on until END_TREE
    group: TaskGroup | None


def fork_leader(spec: LeaderSpec) -> tuple[int, int]:
    """Start one. Returns its process number and the read end of its pipe. Raises OSError."""
    read_end, write_end = os.pipe()
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError:
        os.close(read_end)
        os.close(write_end)
        raise
    if pid == 0:
        _in_child(spec, write_end, parent)
    os.close(write_end)
    os.set_blocking(read_end, False)
    return pid, read_end


def _in_child(spec: LeaderSpec, pipe: int, parent: int) -> NoReturn:
    """Never returns into the wrapper's code, whatever happens."""
    gc.disable()  # which would touch, and so copy, every page that we share with the wrapper
    try:
        _Leader(spec, pipe).lead(parent)
    except BaseException as error:
        try:
            sys.stderr.write(f"the task's leader failed: {error!r}\n")
            sys.stderr.flush()
        finally:
            os._exit(1)
    os._exit(0)


class _Leader:
    def __init__(self, spec: LeaderSpec, pipe: int) -> None:
        self._spec = spec
        self._pipe = pipe
        self._root = 0
        self._ended: tuple[int, str] | None = None
        self._ending = False

    def lead(self, parent: int) -> None:
        self._become_leader()
        if not self._start(parent):
            return
        while self._reap():
            if signal.sigwait({signal.SIGCHLD, END_TREE}) == END_TREE:
                self._ending = True
        self._tell_end()

    def _become_leader(self) -> None:
        spec = self._spec
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, _ignore)  # a handler, because the program would inherit "ignored"
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, END_TREE})
        os.setsid()
        # The lines to the host agent and the client, and their locks, are the wrapper's alone.
        _close_all_but({0, 1, 2, self._pipe, spec.stdin, spec.stdout, spec.stderr})

    def _start(self, parent: int) -> bool:
        import subprocess

        spec = self._spec
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        _prctl(_PR_SET_PDEATHSIG, END_TREE)  # when the wrapper dies
        if os.getppid() != parent:
            return False
        if spec.group is not None:
            spec.group.enter()
        try:
            # We reap ourselves. The object is kept, because one that is dropped reaps its process.
            self._program = subprocess.Popen(
                spec.argv,
                executable=spec.program,
                stdin=spec.stdin,
                stdout=spec.stdout,
                stderr=spec.stderr,
                cwd=spec.directory,
                env=spec.environment,
                process_group=0,
                preexec_fn=self._before_exec,
            )
        except OSError as error:
            self._tell({"errno": error.errno, "file": str(error.filename or "")})
            return False
        self._root = self._program.pid
        self._tell({"pid": self._root})
        return True

    def _before_exec(self) -> None:
        """In the program's process, before it is the program."""
        if self._spec.nice is not None:
            try:
                os.setpriority(os.PRIO_PROCESS, 0, self._spec.nice)
            except OSError:
                pass  # a higher priority than ours needs rights that a volunteer's account rarely has
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD, END_TREE})

    def _reap(self) -> bool:
        """Collect what has ended; whether anything is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                if self._ending:
                    kill_all(lambda: descendants(os.getpid()))
                return True
            if pid == self._root:
                code = os.waitstatus_to_exitcode(status)
                self._ended = (code, "") if code >= 0 else (0, signal_name(-code))
                if self._spec.keep_tree:
                    self._tell_end()
                else:
                    self._ending = True

    def _tell_end(self) -> None:
        code, name = self._ended or (0, "SIGKILL")
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        self._tell({"code": code, "signal": name, "cpu_s": usage.ru_utime + usage.ru_stime})

    def _tell(self, message: Mapping[str, object]) -> None:
        try:
            os.write(self._pipe, json.dumps(message).encode() + b"\n")  # short: written as a whole
        except OSError:
            pass  # the wrapper is gone


def signal_name(number: int) -> str:
    """`SIGKILL` for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _ignore(_number: int, _frame: object) -> None:
    pass


def _prctl(option: int, value: int) -> None:
    """Linux only; elsewhere `leftovers.py` and sampling have to do."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _close_all_but(kept: set[int]) -> None:
    limit = os.sysconf("SC_OPEN_MAX")
    low = 0
    for descriptor in (*sorted(kept), limit if 0 < limit < 1 << 20 else 1 << 20):
        if low < descriptor:  # an empty range means "all"
            os.closerange(low, descriptor)
        low = descriptor + 1
