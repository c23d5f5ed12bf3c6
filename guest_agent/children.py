"""The keeper's children: how a program is started, and what is held of it until the host has it."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

from .accounting import Account, Accounts


class Stream:
    """One output stream: what was read from the pipe and the host has not got yet."""

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self.fd = fd  # -1 once it is at its end
        self.buffer = bytearray()
        self.base = 0  # offset of buffer[0]
        self.sent = 0  # offset up to which the present agent was told
        self.next_send = 0.0

    @property
    def end(self) -> int:
        return self.base + len(self.buffer)


class Child:
    def __init__(self, command_id: str, pid: int, account: Account, stdout: int, stderr: int) -> None:
        self.id = command_id
        self.account = account
        self.pid = pid
        self.started = time.monotonic()
        self.running = True
        self.past_deadline = False
        self.result: dict[str, Any] | None = None
        self.told = False  # the present agent knows the result
        self.streams = {"stdout": Stream("stdout", stdout), "stderr": Stream("stderr", stderr)}

    @property
    def drained(self) -> bool:
        return all(stream.fd < 0 and stream.sent == stream.end for stream in self.streams.values())


def spawn(head: dict[str, Any], accounts: Accounts) -> Child:
    """Start the program, leader of a session of its own, with pipes whose reading ends are ours alone.

    By `posix_spawn`, which does less than `subprocess` and less of it in Python: for a short program that counts. It
    has no working directory, so that is ours; and it closes nothing, so all that is open here closes itself.
    """
    opened: list[int] = []
    account = accounts.open(head["id"])
    try:
        if head["stdin"]:
            opened.append(os.open(head["stdin"], os.O_RDONLY))
        stdin = (os.POSIX_SPAWN_DUP2, opened[0], 0) if opened else (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
        stdout, out_end = os.pipe()
        opened += (stdout, out_end)
        stderr, err_end = os.pipe()
        opened += (stderr, err_end)
        os.chdir(head["cwd"])
        environment = {**_OURS, **head["env"]}
        with account.starting():
            pid = os.posix_spawn(
                _found(head["argv"][0], environment),
                head["argv"],
                environment,
                file_actions=[stdin, (os.POSIX_SPAWN_DUP2, out_end, 1), (os.POSIX_SPAWN_DUP2, err_end, 2)],
                setsid=True,
                setsigdef=_IGNORED,
            )
    except BaseException:
        for fd in opened:
            os.close(fd)
        account.close()
        raise
    for fd in opened:
        if fd not in (stdout, stderr):
            os.close(fd)
    account.started(pid)
    return Child(head["id"], pid, account, stdout, stderr)


_OURS = dict(os.environ)
_IGNORED = [getattr(signal, name) for name in ("SIGPIPE", "SIGXFSZ") if hasattr(signal, name)]  # by Python itself


def _found(program: str, environment: dict[str, str]) -> str:
    """Where the program is, by its own environment's PATH. OSError: it is not there."""
    if os.sep in program:
        return program
    for folder in os.get_exec_path(environment):
        path = os.path.join(folder, program)  # noqa: PTH118
        if os.access(path, os.X_OK) and os.path.isfile(path):  # noqa: PTH113
            return path
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), program)


def why_not_started(head: dict[str, Any], error: OSError | ValueError) -> str:
    program = head["argv"][0]
    if isinstance(error, ValueError):
        return f"{program}: {error}"
    if head["stdin"] and error.filename == head["stdin"]:
        return f"standard input {head['stdin']}: {error.strerror}"
    if not Path(head["cwd"]).is_dir():
        return f"there is no directory {head['cwd']}"
    return f"{program}: {error.strerror}"


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name[len("SIG") :]
    except ValueError:  # a real-time signal
        return str(number)
