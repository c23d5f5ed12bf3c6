"""Programs that this host agent runs in its guests.

    ASKED ──acknowledged──▶ RUNNING ──RESULT──▶ ENDED
      └──RESULT, or the VM ended────────────────▲ │
                      ◀──── undone by a restore ──┘

A command ends exactly once: by the guest's RESULT, or as `lost` when its end will never be known; only the restore of
a snapshot in which it still ran opens it again. Output goes to the host's disk as it comes, and is acknowledged only
after it was written, so a slow disk slows the program and nothing grows.
"""

from __future__ import annotations

import enum
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from common.errors import ConfigError, ProtocolError
from common.messages import Message, Output, Result, Run, Signal, Started, Usage, fields_of

from .commits import Commits
from .events import Happened
from .guests import Guest
from .outbox import Outbox, Record
from .reconcile import Action, HostView
from .streams import OutputGap, OutputStream, SpoolStream

KEEP_ENDED = 1000  # commands whose results can still be asked for
DEADLINE_GRACE = 30.0  # seconds after a command's own deadline that its RESULT may take
LOOK_AGAIN = 5.0  # seconds, at least, when a paused VM has made it later

Update = Callable[[str, dict[str, Any]], None]  # name, data


class State(enum.Enum):
    ASKED = "asked"
    RUNNING = "running"
    ENDED = "ended"


@attrs.define(eq=False)
class Command:
    """One program run in a guest."""

    id: str
    guest: Guest | None  # None: its VM was gone before this host agent began
    run: Run
    record: Record = attrs.field(repr=False)
    streams: dict[str, OutputStream] = attrs.field(repr=False)
    state: State = State.ASKED
    pid: int = 0
    started_at: float | None = None  # seconds since 1970, as this host agent saw it
    ended_at: float | None = None
    usage: Usage | None = None
    result: Result | None = None
    noted: bool = True  # it is on the disk that it was asked for, so it may be answered
    gap: str = ""  # why its output is not whole
    signals: list[str] = attrs.field(factory=list)  # not yet acknowledged
    watchers: list[Update] = attrs.field(factory=list, repr=False)
    waiters: list[Deferred[Result]] = attrs.field(factory=list, repr=False)

    @property
    def ended(self) -> bool:
        return self.state is State.ENDED

    @property
    def about(self) -> dict[str, Any]:
        """What the log says with each event of this command."""
        name = self.guest.name if self.guest is not None else self.record.guest
        return {"vm": name, "instance": self.record.guest, "command": self.id}

    def wait(self) -> Deferred[Result]:
        """Fires with the result; never fails."""
        waiter: Deferred[Result] = Deferred()
        self.waiters.append(waiter)
        self.answer()
        return waiter

    def answer(self) -> None:
        """Tell the result to those who wait for it, when there is one to tell."""
        if self.result is not None and self.noted:
            waiters, self.waiters = self.waiters, []
            for waiter in waiters:
                waiter.callback(self.result)

    def tell(self, name: str, data: dict[str, Any]) -> None:
        for watcher in list(self.watchers):
            watcher(name, data)


class Commands:
    """All commands, by id."""

    _log = Logger()

    def __init__(self, clock: IReactorTime, outbox: Outbox, commits: Commits, spools: Path) -> None:
        self._clock = clock
        self._outbox = outbox
        self._commits = commits
        self._spools = spools
        self._commands: dict[str, Command] = {}
        self._ended: deque[str] = deque()  # ids, in the order in which they ended

    def load(self, find_guest: Callable[[str], Guest | None]) -> None:
        """Take up what an earlier host agent had asked for."""
        for record in [each for each in self._outbox.records.values() if not each.is_copy]:
            try:
                command = self._rebuild(record, find_guest(record.guest))
            except (KeyError, TypeError, ProtocolError) as error:
                self._log.warn("forgot command {id} of an earlier agent: {error!r}", id=record.id, error=error)
                self._outbox.forgotten(record)
                continue
            if command.guest is None and not command.ended:
                self.end(command, Result(command.id, "lost", reason="its VM was gone when the host agent came back"))

    def _rebuild(self, record: Record, guest: Guest | None, run: Run | None = None) -> Command:
        """`run`: what is asked for just now, so that nothing can be there of its output."""
        request = record.request
        streams = self._streams(
            record.id, request["stdout"], request["stderr"], request["starts"], fresh=run is not None
        )
        command = Command(record.id, guest, run or Run(**request["run"]), record, streams)
        if record.result is not None:
            command.state, command.result = State.ENDED, Result(**record.result)
            self._ended.append(command.id)
        elif record.delivered:
            command.state = State.RUNNING
        self._commands[command.id] = command
        self._watch_deadline(command)
        return command

    def _streams(
        self, command: str, stdout: str, stderr: str, starts: list[int], *, fresh: bool = False
    ) -> dict[str, OutputStream]:
        return {
            name: OutputStream(path, start)
            if path
            else SpoolStream(f"{self._spools}{os.sep}{command}.{name}", fresh=fresh)
            for name, path, start in zip(("stdout", "stderr"), (stdout, stderr), starts, strict=True)
        }

    # -- what requesters ask for

    def __iter__(self) -> Iterator[Command]:
        return iter(list(self._commands.values()))

    def get(self, command_id: str) -> Command | None:
        return self._commands.get(command_id)

    def of(self, guest: Guest) -> list[Command]:
        """The guest's commands that have not ended."""
        return [c for c in self._commands.values() if c.guest is guest and not c.ended]

    def run(self, guest: Guest, run: Run, stdout: str = "", stderr: str = "") -> Command:
        """Ask a guest to run a program. `stdout` and `stderr` name files of the host that are appended to;
        each belongs to its stream alone while the command runs."""
        if stdout and stdout == stderr:
            raise ConfigError(f"stdout and stderr cannot both go to {stdout}", "give each a file of its own")
        request = {
            "is": "asked",
            "id": run.command,
            "guest": guest.id,
            "run": fields_of(run),
            "stdout": stdout,
            "stderr": stderr,
            "starts": [_length_of(stdout), _length_of(stderr)],
            "at": time.time(),
        }
        self._drop_oldest()
        try:
            record = self._outbox.asked(request)
        except OSError as error:
            raise ConfigError(f"the outbox of this host agent cannot be written: {error.strerror}") from None
        command = self._rebuild(record, guest, run)
        command.noted = False
        self._ask(command)
        # Both when RUN is written, in the next turn: the guest works meanwhile.
        self._clock.callLater(0, self._log_asked, command)
        self._commits.after_flush(lambda failure: self._noted(command, failure))
        return command

    def _log_asked(self, command: Command) -> None:
        self._log.info(
            "{vm} {command}: asked for {program}",
            event=Happened.COMMAND_ASKED,
            program=command.run.argv[0],
            deadline_s=command.run.deadline_s,
            **command.about,
        )

    def _noted(self, command: Command, failure: OSError | None) -> None:
        command.noted = True
        if failure is not None and not command.ended:
            self.signal(command, "KILL")
            reason = f"the outbox of this host agent cannot be written: {failure.strerror}"
            self.end(command, Result(command.id, "lost", reason=reason))
        command.answer()

    def signal(self, command: Command, name: str) -> None:
        """Send a signal to the command's processes; repeated after a restart of the guest's agent."""
        if not command.ended:
            command.signals.append(name)
            self._log.info(
                "{vm} {command}: signal {signal}", event=Happened.COMMAND_SIGNAL, signal=name, **command.about
            )
            self._send_signal(command, name)

    def _send_signal(self, command: Command, name: str) -> None:
        def delivered() -> None:
            if name in command.signals:
                command.signals.remove(name)

        if command.guest is not None:
            command.guest.link.send(Signal(command.id, name), delivered)

    def _ask(self, command: Command) -> None:
        def delivered() -> None:
            if command.ended:
                return  # RESULT has brought this acknowledgement: it says more, and is noted
            self._outbox.delivered(command.record)
            if command.state is State.ASKED:
                command.state = State.RUNNING
                if not command.pid:
                    self._log.info("{vm} {command}: delivered", event=Happened.COMMAND_DELIVERED, **command.about)

        if command.guest is not None:
            command.guest.link.send(command.run, delivered)
            for name in command.signals:
                self._send_signal(command, name)

    def _drop_oldest(self) -> None:
        while len(self._ended) > KEEP_ENDED:
            command = self._commands.get(self._ended.popleft())
            if command is None or not command.ended:
                continue  # a restored snapshot has opened it again
            del self._commands[command.id]
            for stream in command.streams.values():
                stream.forget()
            self._outbox.forgotten(command.record)

    # -- deadlines

    def _watch_deadline(self, command: Command) -> None:
        """The guest enforces a deadline; this is for a guest that cannot. Time in which its VM stood still is free."""
        if command.run.deadline_s and not command.ended and command.guest is not None:
            now = self._clock.seconds()
            most = command.run.deadline_s + DEADLINE_GRACE
            self._clock.callLater(most, self._overdue, command, now + most - command.guest.stood_still(now))

    def _overdue(self, command: Command, due: float) -> None:
        """`due`: on a clock that stands still while the guest's VM does."""
        if command.ended or command.guest is None:
            return
        now = self._clock.seconds()
        left = due + command.guest.stood_still(now) - now
        if left > 0:
            self._clock.callLater(max(left, LOOK_AGAIN), self._overdue, command, due)
            return
        self.signal(command, "KILL")
        self.end(command, Result(command.id, "lost", reason=f"no result {DEADLINE_GRACE:.0f} s after its deadline"))

    # -- what guests say

    def message(self, guest: Guest, message: Message) -> None:
        """A numbered message about a command."""
        command = self._commands.get(getattr(message, "command", ""))
        if command is None or command.guest is not guest:
            if isinstance(message, Result):
                self._commits.confirm(guest, message.command)  # of a life that we no longer know
        elif isinstance(message, Started):
            self._started(command, message.pid, time.time())
        elif isinstance(message, Output):
            self._output(command, message)
        elif isinstance(message, Usage):
            command.usage = message
            command.tell("usage", {"cpu_s": message.cpu_s, "rss_bytes": message.rss_bytes})
            if message.fraction is not None:
                command.tell("fraction", {"fraction": message.fraction})
        elif isinstance(message, Result):
            if message.pid and not command.pid and not command.ended:
                self._started(command, message.pid, time.time() - message.wall_s)
            if self.end(command, message):
                self._commits.confirm(guest, message.command)

    def _started(self, command: Command, pid: int, at: float) -> None:
        """`at`: seconds since 1970, at most; the news took its time."""
        command.pid = pid
        command.started_at = command.started_at or at
        asked_at = command.record.asked_at
        self._log.info(
            "{vm} {command}: runs as process {pid}",
            event=Happened.COMMAND_STARTED,
            pid=pid,
            latency_s=None if asked_at is None else max(0.0, command.started_at - asked_at),
            **command.about,
        )
        command.tell("started", {"command": command.id, "pid": pid})

    def _output(self, command: Command, message: Output) -> None:
        if command.ended or command.gap:
            return
        try:
            fresh = command.streams[message.stream].take(message.offset, message.payload)
        except OSError as error:
            # The program must not go on as if its output were safe.
            self.signal(command, "KILL")
            reason = f"its {message.stream} cannot be written: {error.strerror}"
            self.end(command, Result(command.id, "lost", reason=reason))
            return
        except OutputGap as error:
            command.gap = f"{message.stream}: {error}"
            self._log.error("{id}: {error}", id=command.id, error=command.gap)
            return
        if fresh:
            offset = command.streams[message.stream].have - len(fresh)
            command.tell("output", {"stream": message.stream, "offset": offset, "bytes": fresh})

    def end(self, command: Command, result: Result) -> bool:
        """The command's end. False when the host's disk does not take it: the guest then keeps it."""
        if command.ended:
            return True
        have = (command.streams["stdout"].have, command.streams["stderr"].have)
        if result.outcome != "lost" and (command.gap or have != (result.stdout_bytes, result.stderr_bytes)):
            reason = command.gap or "its output did not survive a restart of the guest"
            result = attrs.evolve(result, outcome="lost", reason=f"it {result.outcome}, but {reason}")
        command.state, command.result, command.ended_at = State.ENDED, result, time.time()
        self._ended.append(command.id)
        command.signals.clear()
        for stream in command.streams.values():
            stream.close()
        self._log.info(
            "{vm} {command}: {outcome} {detail}",
            event=Happened.COMMAND_ENDED,
            outcome=result.outcome,
            exit_code=result.exit_code,
            signal=result.signal,
            reason=result.reason,
            wall_s=result.wall_s,
            cpu_s=result.user_s + result.system_s,
            max_rss_bytes=result.max_rss_bytes,
            detail=result.reason or result.signal or ("" if result.exit_code is None else result.exit_code),
            **command.about,
        )
        command.answer()
        command.watchers.clear()
        try:
            # After the answer: until this is on the disk the guest keeps the result too.
            self._outbox.ended(command.record, fields_of(result))
        except OSError as error:
            self._log.error("the end of {id} is not in the outbox: {error}", id=command.id, error=error)
            return False
        return True

    # -- reconciliation (`reconcile.py`)

    def view(self, command_id: str) -> HostView:
        command = self._commands.get(command_id)
        if command is None:
            return HostView.UNKNOWN
        if command.ended:
            return HostView.ENDED
        return HostView.DELIVERED if command.record.delivered else HostView.ASKED

    def act(self, action: Action, guest: Guest, command_id: str) -> None:
        """Carry out a rule of `reconcile.RULES`."""
        if action is Action.STOP:
            guest.link.send(Signal(command_id, "KILL"))
        elif action is Action.CONFIRM:
            self._commits.confirm(guest, command_id)
        elif action is Action.LOST:
            reason = "the guest was restarted and has forgotten it"
            self.end(self._commands[command_id], Result(command_id, "lost", reason=reason))
        elif action in (Action.ASK, Action.RESUME):
            command = self._commands[command_id]
            command.gap = ""
            command.run = attrs.evolve(
                command.run,
                attempt=command.run.attempt + 1,
                have_stdout=command.streams["stdout"].have,
                have_stderr=command.streams["stderr"].have,
            )
            self._ask(command)

    def guest_gone(self, guest: Guest, reason: str) -> None:
        """The guest's VM ended: nothing of it will be heard any more."""
        for command in self.of(guest):
            self.end(command, Result(command.id, "lost", reason=reason))

    # -- snapshots

    def mark(self, guest: Guest) -> list[dict[str, Any]]:
        """How far the guest's commands are; taken while its VM stands still for a snapshot.

        OSError: not even the ends of the others are on the disk, which a roll-back would take for undone.
        """
        self._outbox.flush()
        return [
            {
                "request": command.record.request,
                "delivered": command.record.delivered,
                "have": [command.streams["stdout"].have, command.streams["stderr"].have],
            }
            for command in self.of(guest)
        ]

    def can_roll_back(self, mark: list[dict[str, Any]]) -> bool:
        """Whether the output up to the mark is on this disk: a power cut may have taken its end away."""
        for entry in mark:
            request = entry["request"]
            known = self._commands.get(request["id"])
            where = (request["stdout"], request["stderr"], request["starts"])
            streams = known.streams if known is not None else self._streams(request["id"], *where)
            if not all(stream.holds(have) for stream, have in zip(streams.values(), entry["have"], strict=True)):
                return False
        return True

    def roll_back(self, guest: Guest, mark: list[dict[str, Any]], reason: str, note: Mapping[str, Any]) -> None:
        """The guest went back to where `mark` was taken: so do its commands, and the files of their output."""
        then = {entry["request"]["id"]: entry for entry in mark}
        for command in self.of(guest):
            if command.id not in then:
                self.end(command, Result(command.id, "lost", reason=f"undone: {reason}"))
        for command_id, entry in then.items():
            known = self._commands.get(command_id)
            if known is None:
                known = self._rebuild(self._outbox.asked(entry["request"]), guest)
            self._outbox.reopened(known.record, delivered=entry["delivered"])
            known.state = State.RUNNING if entry["delivered"] else State.ASKED
            known.result, known.gap, known.ended_at = None, "", None
            for stream, have in zip(known.streams.values(), entry["have"], strict=True):
                stream.cut(have)
            known.tell("rolled_back", {"note": dict(note)})


def _length_of(path: str) -> int:
    """Bytes in a file that output is going to be appended to; it must be one that can be written."""
    if not path:
        return 0
    try:
        with Path(path).open("ab") as file:
            return file.tell()
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


def new_id() -> str:
    """An id for a command or a copy: 64 random bits."""
    return f"c-{secrets.token_hex(8)}"
