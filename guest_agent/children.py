"""The keeper's children: how a program is started, and what is held of it until the host has it."""

from __future__ import annotations

import os
import signal
import subprocess
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
    def __init__(
        self, command_id: str, process: subprocess.Popen[bytes], account: Account, stdout: int, stderr: int
    ) -> None:
        self.id = command_id
        self.account = account
        self.process = process
        self.pid = process.pid
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
    """Start the program, leader of a session of its own, with pipes whose reading ends are ours alone."""
    opened: list[int] = []
    account = accounts.open(head["id"])
    try:
        stdin = os.open(head["stdin"] or os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        opened.append(stdin)
        stdout, out_end = os.pipe()
        opened += (stdout, out_end)
        stderr, err_end = os.pipe()
        opened += (stderr, err_end)
        with account.starting():
            process = subprocess.Popen(
                head["argv"],
                cwd=head["cwd"],
                env={**os.environ, **head["env"]},
                stdin=stdin,
                stdout=out_end,
                stderr=err_end,
                start_new_session=True,
            )
    except BaseException:
        for fd in opened:
            os.close(fd)
        account.close()
        raise
    for fd in (stdin, out_end, err_end):
        os.close(fd)
    account.started(process.pid)
    return Child(head["id"], process, account, stdout, stderr)


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
