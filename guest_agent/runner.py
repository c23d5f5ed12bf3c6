"""The agent's side of the keeper: runs the host's commands and reports what becomes of them.

    ACCEPTED ──started──▶ RUNNING ──ended──▶ ENDED ──CONFIRM──▶ (forgotten)
        └──refused, or ended within a moment───┘

A command is in the journal before the keeper hears of it. Its result is there after the host was told: until then the
keeper has it, and would tell it again.
"""

from __future__ import annotations

import enum
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from common.errors import ConfigError
from common.files import confine
from common.link import Link
from common.messages import ENDED, MAX_PAYLOAD, RUNNING, Output, Result, Run, Signal, Started, Usage, fields_of

from .accounting import Account, Accounts, Used, accounts
from .journal import Journal
from .keeper_socket import KeeperSocket

USAGE_EVERY = 0.5  # seconds between looks at a command's fraction file and CPU time
USAGE_SHARE, USAGE_LONGEST = 0.05, 5.0  # its CPU time alone is told after so much of its run time, at most so many s
MOST_HELD = 2048  # commands that run, or whose end the host has not confirmed
FRACTION_MOST = 4096  # bytes that are read from the end of a fraction file

_NUMBER = re.compile(rb"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


class State(enum.Enum):
    ACCEPTED = "accepted"
    RUNNING = "running"
    ENDED = "ended"


@attrs.define(eq=False)
class _Command:
    run: Run
    state: State = State.ACCEPTED
    pid: int = 0
    account: Account | None = None
    kept: bool = False  # the keeper has it, with the output that the host has not acknowledged
    sending: bool = False  # the host of this session has asked, and the keeper's output begins where it wants it
    result: Result | None = None
    last_usage: Usage | None = None
    began: float = 0.0  # by the reactor's clock; for a command of an agent before us, when we learned of it
    usage_due: float = 0.0  # when CPU time alone is worth telling


class KeeperConnection(Protocol):
    """Whoever starts the programs: the keeper behind its socket, or `direct.DirectKeeper`."""

    def tell(self, head: dict[str, Any]) -> None: ...


class Runner:
    """Runs commands below `home` and tells the host through `link`."""

    _log = Logger()

    def __init__(
        self,
        reactor: Any,
        home: Path,
        journal: Journal,
        link: Link,
        keeper_gone: Callable[[], None],
        environment: Mapping[str, str],
        counting: Accounts | None = None,
    ) -> None:
        """`environment`: of all programs, before a command's own. `counting`: how; the best way by itself."""
        self._environment = environment
        self._reactor: IReactorTime = reactor
        self._keeper_gone = keeper_gone
        self.boot = ""  # the keeper's life, which is that of all programs here
        self._home = home
        self._journal = journal
        self._link = link
        self._commands: dict[str, _Command] = {}
        self._accepted: list[_Command] = []  # in the journal, which is going to be flushed
        self._keeper: KeeperConnection | None = None
        self._accounts = counting or accounts()
        self._usage = LoopingCall(self._look_at_usage)
        self._usage.clock = reactor
        for command, result in journal.commands.items():
            if result is not None:
                self._adopt_result(command, Result(command, **result))

    # -- the keeper's connection

    def connect(
        self, reactor: Any, path: Path, ready: Callable[[], None], connected: socket.socket | None = None
    ) -> None:
        """Connect to the keeper; `ready` is called when it has told what it holds. Retries while it starts.

        `connected`: there is a connection already.
        """
        if not hasattr(os, "fork"):
            from .direct import DirectKeeper

            DirectKeeper(reactor, self, self._accounts).begin(ready)
            return

        def heard(head: dict[str, Any], payload: bytes) -> None:
            if head["op"] == "state":
                self.keeper_state(connection, head["keeper"], head["commands"])
                ready()
            else:
                self.kept(head, payload)

        connection = KeeperSocket(reactor, path, heard, self.keeper_lost, connected)
        connection.connect()

    def keeper_state(self, connection: KeeperConnection, keeper_id: str, commands: list[dict[str, Any]]) -> None:
        """The keeper's first words: who it is, and what it holds from before this agent was started."""
        self._keeper = connection
        self.boot = keeper_id
        held = {entry["id"]: entry for entry in commands}
        for command, result in list(self._journal.commands.items()):
            if result is None and command not in held and self._journal.keeper_of(command) == keeper_id:
                # The agent before us died before it could hand this on: it has not run, and may be asked for again.
                self._forget(command)
            elif result is None and command not in held:
                self._end(command, Result(command, "lost", reason="the guest or its agent's keeper was restarted"))
        for command, entry in held.items():
            if command not in self._journal.commands:
                connection.tell({"op": "forget", "ids": [command]})
                continue
            known = self._commands.setdefault(command, _Command(Run(command, ("?",)), State.RUNNING))
            known.pid, known.kept = entry["pid"], True
            known.account = self._accounts.find(entry["account"], known.pid)
            known.began = self._reactor.seconds()

    def keeper_lost(self) -> None:
        """Without its keeper no command's end can be known any more."""
        self._keeper = None
        for command in self._commands.values():
            command.kept = False
        for command in [c for c in self._commands.values() if c.state is not State.ENDED]:
            self._end(command.run.command, Result(command.run.command, "lost", reason="the guest's keeper ended"))
        self._keeper_gone()

    def new_session(self) -> None:
        """The host will say which commands it wants to hear of, and from where: until then nothing is sent."""
        for command in self._commands.values():
            command.sending = False

    # -- what the host asks for

    def run(self, message: Run) -> None:
        known = self._commands.get(message.command)
        if known is not None:
            self._again(known, message)
            return
        if (refusal := self._why_not_take(message.command)) is not None:
            # Nothing was noted and nothing has run, so a repeat may find that it can be taken after all.
            self._link.send(Result(message.command, "not_started", reason=refusal))
            return
        command = self._commands[message.command] = _Command(message, sending=True)
        self._accepted.append(command)
        if not self._journal.lasting:
            self._hand_over()
        elif len(self._accepted) == 1:
            self._reactor.callLater(0, self._hand_over)  # after one flush for all that came together

    def _hand_over(self) -> None:
        """Let the keeper start what was accepted, once that is on the disk."""
        commands, self._accepted = self._accepted, []
        try:
            self._journal.flush()
        except OSError as error:
            for command in commands:
                name = command.run.command
                self._end(name, Result(name, "not_started", reason=_unwritten(error)))
            return
        for command in commands:
            if command.state is State.ACCEPTED and self._keeper is not None:
                self._spawn(self._keeper, command)

    def _spawn(self, keeper: KeeperConnection, command: _Command) -> None:
        message = command.run
        try:
            cwd = confine(self._home, message.cwd) if message.cwd else self._home
            stdin = str(confine(self._home, message.stdin)) if message.stdin else ""
            if message.fraction_file:
                confine(self._home, message.fraction_file)
        except ConfigError as error:
            self._end(message.command, Result(message.command, "not_started", reason=str(error)))
            return
        command.kept = True
        keeper.tell(
            {
                "op": "spawn",
                "id": message.command,
                "argv": message.argv,
                "env": {**self._environment, **message.env},
                "cwd": str(cwd),
                "stdin": stdin,
                "deadline": message.deadline_s,
            }
        )

    def _why_not_take(self, command: str) -> str | None:
        """Why a new command cannot be taken; None when it is noted in the journal."""
        if self._keeper is None:
            return "the guest's keeper is gone"
        if len(self._commands) >= MOST_HELD:
            return f"the guest holds {MOST_HELD} commands already"
        try:
            self._journal.accepted(command, self.boot)
        except OSError as error:
            return _unwritten(error)
        return None

    def _again(self, command: _Command, message: Run) -> None:
        """A RUN that we know: the host has started anew. Tell it all it lacks; run nothing."""
        command.run = message
        if command in self._accepted:
            command.sending = True  # it is going to be started, and all of it told
            return
        result = command.result
        if command.state is State.ENDED and result is not None:
            have = (message.have_stdout, message.have_stderr)
            if not command.kept or have == (result.stdout_bytes, result.stderr_bytes):
                self._link.send(result)
                return
            command.state = State.RUNNING  # until the keeper has given out the rest once more
        if command.pid:
            self._link.send(Started(message.command, command.pid))
            self._watch_usage()
        if self._keeper is not None:
            # What the keeper has sent us so far may begin anywhere; what follows its `sought` begins there.
            command.sending = False
            self._keeper.tell(
                {"op": "seek", "id": message.command, "stdout": message.have_stdout, "stderr": message.have_stderr}
            )

    def signal(self, message: Signal) -> None:
        if any(command.run.command == message.command for command in self._accepted):
            self._hand_over()  # its RUN came just now: the keeper ignores signals to what it does not know
        if self._keeper is not None:
            self._keeper.tell({"op": "signal", "id": message.command, "signal": message.signal})

    def confirm(self, commands: Sequence[str]) -> None:
        """The host has the results."""
        for command in commands:
            self._commands.pop(command, None)
            self._forget(command)
        if self._keeper is not None:
            self._keeper.tell({"op": "forget", "ids": commands})

    def _forget(self, command: str) -> None:
        try:
            self._journal.forgotten(command)
        except OSError as error:
            self._log.warn("the journal cannot be written: {error}", error=error)

    def held(self) -> dict[str, str]:
        """What HELLO says of the commands."""
        return {name: ENDED if c.state is State.ENDED else RUNNING for name, c in self._commands.items()}

    def running(self) -> dict[str, float]:
        """How many seconds each command has run that runs now."""
        now = self._reactor.seconds()
        return {name: now - c.began for name, c in self._commands.items() if c.state is State.RUNNING}

    # -- what the keeper tells

    def kept(self, head: dict[str, Any], payload: bytes) -> None:
        command = self._commands.get(head["id"])
        if command is None:
            return
        if head["op"] == "output":
            if command.sending:
                self._output(command, head["stream"], head["offset"], payload)
        elif head["op"] == "started":
            command.state, command.pid, command.began = State.RUNNING, head["pid"], self._reactor.seconds()
            command.account = self._accounts.find(head["account"], command.pid)
            self._link.send(Started(command.run.command, command.pid))
            self._log.info("{command}: runs as process {pid}", command=command.run.command, pid=command.pid)
            self._watch_usage()
        elif head["op"] == "sought":
            command.sending = True
        elif head["op"] == "refused":
            command.kept = False
            self._end(head["id"], Result(head["id"], "not_started", reason=head["reason"]))
        elif head["op"] == "ended":
            fields = {key: value for key, value in head.items() if key not in ("op", "id")}
            if command.run.fraction_file:
                self._send_usage(command)  # the last word on it; CPU time is in the result
            self._end(head["id"], Result(head["id"], **fields))

    def _output(self, command: _Command, stream: str, offset: int, payload: bytes) -> None:
        end = offset + len(payload)

        def acknowledged() -> None:
            if self._keeper is not None:
                self._keeper.tell({"op": "ack", "id": command.run.command, "stream": stream, "offset": end})

        for start in range(0, len(payload), MAX_PAYLOAD):
            piece = payload[start : start + MAX_PAYLOAD]
            last = start + len(piece) == len(payload)
            self._link.send(Output(command.run.command, stream, offset + start, piece), acknowledged if last else None)

    def _end(self, command: str, result: Result) -> None:
        self._adopt_result(command, result)
        if self._commands[command].sending:
            self._link.send(result)
        try:
            self._journal.ended(command, fields_of(result, but="command"))
        except OSError as error:
            self._log.warn("the end of {id} is not in the journal: {error}", id=command, error=error)
        # Of a short program that went well, nothing: the host's log says it, and to write a line to the console of an
        # emulated machine takes more than a millisecond.
        if self._commands[command].pid or result.exit_code != 0:
            self._log.info(
                "{command}: {outcome} {detail}",
                command=command,
                outcome=result.outcome,
                detail=result.reason or result.signal or ("" if result.exit_code is None else result.exit_code),
            )

    def _adopt_result(self, command: str, result: Result) -> None:
        known = self._commands.get(command)
        if known is None:
            known = self._commands[command] = _Command(Run(command, ("?",)))
        known.state, known.result = State.ENDED, result

    # -- usage and the fraction done

    def _watch_usage(self) -> None:
        if not self._usage.running:
            self._usage.start(USAGE_EVERY, now=False)

    def _look_at_usage(self) -> None:
        running = [c for c in self._commands.values() if c.state is State.RUNNING]
        for command in running:
            self._send_usage(command)
        if not running and self._usage.running:
            self._usage.stop()

    def _send_usage(self, command: _Command) -> None:
        if self._link.congested:
            return
        now = self._reactor.seconds()
        last, fraction = command.last_usage, self._fraction(command)
        moved = fraction != (last.fraction if last else None)
        if now < command.usage_due and not moved:
            return
        used = command.account.used() if command.account is not None else Used()
        cpu_s = max(used.cpu_s, last.cpu_s if last else 0.0)
        if last is None or moved or cpu_s - last.cpu_s >= 0.1:
            command.usage_due = now + min(USAGE_SHARE * (now - command.began), USAGE_LONGEST)
            command.last_usage = Usage(command.run.command, cpu_s, used.rss_bytes, fraction)
            self._link.send(command.last_usage)

    def _fraction(self, command: _Command) -> float | None:
        if not command.run.fraction_file:
            return None
        try:
            with confine(self._home, command.run.fraction_file).open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - FRACTION_MOST))
                numbers = _NUMBER.findall(file.read(FRACTION_MOST))
        except (OSError, ConfigError):
            return None
        return min(1.0, max(0.0, float(numbers[-1]))) if numbers else None

    def stop(self) -> None:
        """End every command and the keeper with them."""
        if self._usage.running:
            self._usage.stop()
        if self._keeper is not None:
            self._keeper.tell({"op": "quit"})


def _unwritten(error: OSError) -> str:
    return f"the guest's journal cannot be written: {error.strerror}"
