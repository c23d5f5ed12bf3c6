"""Processes on Linux and macOS: a leader and a tree for every task, signalled and measured as a whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import time
from typing import Any

from .host_leader import END_TREE, LeaderSpec, fork_leader
from .host_task import ExitStatus, ProcessSpec
from .process_tree import (
    ProcessStat,
    descendants,
    is_below,
    kill_all,
    session_members,
    signal_all,
    signal_each,
    tree_cpu_seconds,
)
from .task_groups import HostGroup

NICE = {1: 19, 2: 10, 3: 0, 4: -10, 5: -15}  # BOINC's process priorities
START_DEADLINE_S = 30.0  # for a fork and an exec, on a machine that swaps
END_DEADLINE_S = 10.0  # for the kernel to end what was killed; a process that waits for a dead disk takes for ever


class PosixProcess:
    """A program with everything that it starts. `keep_tree`: what it leaves behind may go on until `kill()`."""

    def __init__(self, spec: ProcessSpec, keep_tree: bool = False, use_tstp: bool = False) -> None:
        self._keep_tree = keep_tree
        self._stop_signal = signal.SIGTSTP if use_tstp else signal.SIGSTOP
        self._stop_root_only = use_tstp and not spec.multi_process
        self._cpu_s = 0.0
        self._status: ExitStatus | None = None
        self._reaped = False
        self._pipe_ended = False
        self._buffer = bytearray()
        self._messages: list[dict[str, Any]] = []
        self._group = HostGroup.for_task()
        try:
            with spec.open_files() as (stdin, stdout, stderr):
                leader = LeaderSpec(
                    program=spec.program,
                    argv=spec.argv,
                    directory=str(spec.directory),
                    environment=spec.environment,
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                    nice=NICE[spec.priority] if spec.priority else None,
                    keep_tree=keep_tree,
                    group=self._group,
                )
                self.pid, self._pipe = fork_leader(leader)
        except OSError:
            self._remove_group()
            raise
        try:
            self._root = self._started()
        except OSError:
            self._end_leader()
            self.close()
            raise

    def _started(self) -> int:
        """The program's own process number. Raises OSError when it could not be started."""
        message = self._next_message(START_DEADLINE_S) or {"errno": errno.EAGAIN, "file": ""}
        if "pid" in message:
            return int(message["pid"])
        number = int(message["errno"])
        raise OSError(number, os.strerror(number), message["file"] or None)

    def fileno(self) -> int:
        """Readable when the leader has something to say; then `receive()`."""
        return self._pipe

    def receive(self) -> None:
        """Read what the leader says. Never waits."""
        if self._pipe < 0 or self._pipe_ended:
            return
        try:
            data = os.read(self._pipe, 4096)
        except BlockingIOError:
            return
        self._pipe_ended = not data
        self._buffer += data
        *lines, rest = bytes(self._buffer).split(b"\n")
        self._buffer[:] = rest
        self._messages += [json.loads(line) for line in lines]

    def _next_message(self, wait_s: float = 0.0) -> dict[str, Any] | None:
        until = time.monotonic() + wait_s
        self.receive()
        while not self._messages and not self._pipe_ended and (left := until - time.monotonic()) > 0:
            select.select([self._pipe], [], [], left)
            self.receive()
        return self._messages.pop(0) if self._messages else None

    def poll(self) -> ExitStatus | None:
        """How the program ended, or None."""
        if self._status is None:
            message = self._next_message()
            if message is not None:
                self._ended(message)
            elif self._pipe_ended:  # somebody killed the leader
                self._end_leader()
                self._status = ExitStatus(0, "SIGKILL")
        return self._status

    def _ended(self, message: dict[str, Any]) -> None:
        grouped = self._group.cpu_seconds() if self._group else None
        self._cpu_s = max(self._cpu_s, float(message["cpu_s"]), grouped or 0.0)
        self._status = ExitStatus(int(message["code"]), str(message["signal"]))
        if not self._keep_tree:
            self._end_leader()

    def suspend(self) -> None:
        """Stop the whole tree; with SIGTSTP and without `multi_process`, its root sees to the rest itself."""
        if self._reaped:
            return
        if self._stop_root_only:
            signal_each([self._root], self._stop_signal)
        else:
            signal_all(self._members, self._stop_signal)

    def resume(self) -> None:
        """Let the whole tree go on."""
        if not self._reaped:
            signal_all(self._members, signal.SIGCONT)

    def terminate(self) -> None:
        """Ask the whole tree to end by itself."""
        if not self._reaped:
            signal_all(self._members, signal.SIGTERM)

    def contains(self, pid: int) -> bool:
        """Whether a process is of this tree."""
        return not self._reaped and is_below(pid, self.pid)

    def kill(self) -> None:
        """End the whole tree and collect its status. Waits for the kernel, with a deadline."""
        if self._reaped:
            return
        signal_each([self.pid], END_TREE)
        while not self._pipe_ended:
            message = self._next_message(END_DEADLINE_S)
            if message is None:
                break
            if self._status is None:
                self._ended(message)
        self._end_leader()
        self._status = self._status or ExitStatus(0, "SIGKILL")

    def cpu_seconds(self) -> float:
        """CPU time of the tree; exact once the program ended."""
        if self._status is None:
            grouped = self._group.cpu_seconds() if self._group else None
            self._cpu_s = max(self._cpu_s, tree_cpu_seconds(self.pid) if grouped is None else grouped)
        return self._cpu_s

    def close(self) -> None:
        """After the end, when nobody watches the pipe any more."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

    def _members(self) -> list[ProcessStat]:
        return descendants(self.pid)

    def _end_leader(self) -> None:
        """Reap the leader. What it may leave, because it was killed or does not answer, is killed too."""
        if self._reaped:
            return
        self._reaped = True
        if self._status is None or self._keep_tree:  # else it had nothing left when it said how its program ended
            kill_all(lambda: [*descendants(self.pid), *session_members(self.pid)])
        signal_each([self.pid], signal.SIGKILL)  # it has said its last word
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        self._remove_group()

    def _remove_group(self) -> None:
        if self._group is not None:
            self._group.remove()
