"""Commands and copies that this host agent has asked of its guests.

    ASKED ──STARTED──▶ RUNNING ──RESULT──▶ ENDED
      └──────────────RESULT / COPIED───────┘

A command ends exactly once: by the guest's RESULT, or as `lost` when its VM is gone. Output goes to the host's disk
as it comes; the link acknowledges it only after it was written, so a slow disk slows the program and nothing grows.
"""

from __future__ import annotations

import enum
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from common.errors import ConfigError, TransferError, VMwrapperError
from common.messages import (
    Confirm,
    Copied,
    CopyIn,
    CopyOut,
    Message,
    Output,
    Result,
    Run,
    Signal,
    Started,
    Usage,
)

from .files_service import FilesService, OpenCopy
from .guests import Guest, GuestListener, Presence

KEEP_ENDED = 1000  # commands whose results can still be asked for
DEADLINE_GRACE = 30.0  # seconds after a command's own deadline that its RESULT may take

Update = Callable[[str, dict[str, Any]], None]  # name, data


class State(enum.Enum):
    ASKED = "asked"
    RUNNING = "running"
    ENDED = "ended"


class _Stream:
    """One output stream on its way to a file of the host."""

    def __init__(self, path: str) -> None:
        self.have = 0
        self._file: BinaryIO | None = Path(path).open("ab", buffering=0) if path else None  # noqa: SIM115

    def take(self, offset: int, payload: bytes) -> bytes:
        """Write what is new in a piece; returns it. A repeat adds nothing."""
        if offset > self.have:
            raise VMwrapperError(f"output is missing between bytes {self.have} and {offset}")
        fresh = payload[self.have - offset :]
        if self._file is not None and fresh:
            self._file.write(fresh)
        self.have += len(fresh)
        return fresh

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


@attrs.define(eq=False)
class Command:
    """One program run in a guest."""

    id: str
    guest: Guest
    run: Run
    streams: dict[str, _Stream] = attrs.field(repr=False)
    state: State = State.ASKED
    delivered: bool = False  # the guest has acknowledged RUN
    pid: int = 0
    usage: Usage | None = None
    result: Result | None = None
    watchers: list[Update] = attrs.field(factory=list, repr=False)
    waiters: list[Deferred[Result]] = attrs.field(factory=list, repr=False)

    def wait(self) -> Deferred[Result]:
        """Fires with the result; never fails."""
        waiter: Deferred[Result] = Deferred()
        if self.result is not None:
            waiter.callback(self.result)
        else:
            self.waiters.append(waiter)
        return waiter

    def tell(self, name: str, data: dict[str, Any]) -> None:
        for watcher in list(self.watchers):
            watcher(name, data)


@attrs.define(eq=False)
class _Copy:
    id: str
    guest: Guest
    message: CopyIn | CopyOut
    opened: OpenCopy
    done: Deferred[Copied]


class Commands(GuestListener):
    """All commands and copies, by id."""

    _log = Logger()

    def __init__(self, clock: IReactorTime, files: FilesService) -> None:
        self._clock = clock
        self._files = files
        self._commands: dict[str, Command] = {}
        self._copies: dict[str, _Copy] = {}

    # -- running programs

    def get(self, command_id: str) -> Command | None:
        return self._commands.get(command_id)

    def running_in(self, guest: Guest) -> int:
        return sum(1 for c in self._commands.values() if c.guest is guest and c.state is not State.ENDED)

    def run(self, guest: Guest, run: Run, stdout: str = "", stderr: str = "") -> Command:
        """Ask a guest to run a program. `stdout` and `stderr` name files of the host that are appended to."""
        try:
            streams = {"stdout": _Stream(stdout), "stderr": _Stream(stderr)}
        except OSError as error:
            raise ConfigError(f"{error.filename} cannot be written: {error.strerror}") from None
        command = Command(run.command, guest, run, streams)
        self._drop_oldest()
        self._commands[command.id] = command
        self._ask(command)
        if run.deadline_s:
            self._clock.callLater(run.deadline_s + DEADLINE_GRACE, self._overdue, command)
        return command

    def _ask(self, command: Command) -> None:
        def delivered() -> None:
            command.delivered = True

        command.guest.link.send(command.run, delivered)

    def _drop_oldest(self) -> None:
        ended = [c.id for c in self._commands.values() if c.state is State.ENDED]
        for command_id in ended[: max(0, len(ended) - KEEP_ENDED)]:
            del self._commands[command_id]

    def _overdue(self, command: Command) -> None:
        if command.state is not State.ENDED:
            reason = f"no result {DEADLINE_GRACE:.0f} s after its deadline"
            self._end(command, Result(command.id, "lost", reason=reason))

    def signal(self, command: Command, name: str) -> None:
        if command.state is not State.ENDED:
            command.guest.link.send(Signal(command.id, name))

    # -- copying files

    def put(self, guest: Guest, source: Path, destination: str, progress: Update) -> Deferred[Copied]:
        """Copy a file or directory of this host into the guest; fires with what was copied or fails with why not."""
        if not source.exists():
            raise TransferError(f"there is no {source}")
        return self._copy(guest, source, True, progress, lambda i, token: CopyIn(i, token, destination))

    def get_files(self, guest: Guest, source: str, destination: Path, progress: Update) -> Deferred[Copied]:
        """Copy a file or directory of the guest to this host."""
        return self._copy(guest, destination, False, progress, lambda i, token: CopyOut(i, token, source))

    def _copy(
        self, guest: Guest, path: Path, inwards: bool, update: Update, ask: Callable[[str, str], CopyIn | CopyOut]
    ) -> Deferred[Copied]:
        copy_id = new_id()

        def progress(done: int, total: int) -> None:
            update("progress", {"bytes": done, "total": total})

        opened = self._files.open_copy(copy_id, guest.id, path, inwards=inwards, progress=progress)
        copy = _Copy(copy_id, guest, ask(copy_id, opened.token), opened, Deferred())
        self._copies[copy_id] = copy
        guest.link.send(copy.message)
        return copy.done

    def _copied(self, copy: _Copy, message: Copied) -> None:
        del self._copies[copy.id]
        self._files.close_copy(copy.opened)
        if message.reason:
            copy.done.errback(TransferError(message.reason))
        else:
            copy.done.callback(message)

    # -- what the guests say

    def guest_message(self, guest: Guest, message: Message) -> None:
        if isinstance(message, Copied):
            guest.link.send(Confirm(message.command))
            copy = self._copies.get(message.command)
            if copy is not None and copy.guest is guest:
                self._copied(copy, message)
            return
        command = self._commands.get(getattr(message, "command", ""))
        if command is None or command.guest is not guest:
            if isinstance(message, Result):
                guest.link.send(Confirm(message.command))  # of a life that we no longer know
            return
        if isinstance(message, Started):
            command.state, command.pid = State.RUNNING, message.pid
            command.tell("started", {"command": command.id, "pid": message.pid})
        elif isinstance(message, Output):
            self._output(command, message)
        elif isinstance(message, Usage):
            command.usage = message
            command.tell("usage", {"cpu_s": message.cpu_s, "rss_bytes": message.rss_bytes})
            if message.fraction is not None:
                command.tell("fraction", {"fraction": message.fraction})
        elif isinstance(message, Result):
            guest.link.send(Confirm(message.command))
            self._end(command, message)

    def _output(self, command: Command, message: Output) -> None:
        if command.state is State.ENDED:
            return
        try:
            fresh = command.streams[message.stream].take(message.offset, message.payload)
        except OSError as error:
            # The program must not go on as if its output were safe.
            self.signal(command, "KILL")
            self._end(command, Result(command.id, "lost", reason=f"its output cannot be written: {error.strerror}"))
            return
        except VMwrapperError as error:
            self._log.error("{id}: {error}", id=command.id, error=error)
            return
        if fresh:
            command.tell("output", {"stream": message.stream, "bytes": fresh})

    def _end(self, command: Command, result: Result) -> None:
        if command.state is State.ENDED:
            return
        command.state, command.result = State.ENDED, result
        for stream in command.streams.values():
            stream.close()
        self._log.info(
            "{name} {id}: {outcome} {detail}",
            name=command.guest.name,
            id=command.id,
            outcome=result.outcome,
            detail=result.reason or result.signal or ("" if result.exit_code is None else result.exit_code),
        )
        waiters, command.waiters = command.waiters, []
        for waiter in waiters:
            waiter.callback(result)
        command.watchers.clear()

    def guest_session(self, guest: Guest, known: Iterable[str]) -> None:
        """The guest's agent has started anew. What it still holds goes on; what it never got is asked again;
        what it had and has forgotten is lost, and is not run a second time."""
        held = set(known)
        for command in [c for c in self._commands.values() if c.guest is guest and c.state is not State.ENDED]:
            if command.id in held or not command.delivered:
                command.run = attrs.evolve(
                    command.run,
                    attempt=command.run.attempt + 1,
                    have_stdout=command.streams["stdout"].have,
                    have_stderr=command.streams["stderr"].have,
                )
                self._ask(command)
            else:
                self._end(command, Result(command.id, "lost", reason="the guest was restarted and has forgotten it"))
        for copy in [c for c in self._copies.values() if c.guest is guest]:
            guest.link.send(copy.message)  # a copy can be done twice

    def guest_gone(self, guest: Guest, reason: str) -> None:
        """The guest's VM ended: nothing of it will be heard any more."""
        guest.presence = Presence.GONE
        for command in [c for c in self._commands.values() if c.guest is guest]:
            self._end(command, Result(command.id, "lost", reason=reason))
        for copy in [c for c in self._copies.values() if c.guest is guest]:
            self._copied(copy, Copied(copy.id, reason=reason))


def new_id() -> str:
    """An id for a command or a copy: 64 random bits."""
    return f"c-{secrets.token_hex(8)}"
