"""The keeper's work inside of the agent, for Windows, which has neither fork nor its way of waiting for children.

It understands what the keeper understands (`keeper.py`) and says what the keeper says, without a socket between. The
difference shows when the agent ends: its programs end with it, because their job objects are closed then, and the
next agent reports them as lost.

Threads do what would block, one for each stream and one for each program's end; all else happens in the reactor.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import IO, Any, Callable, Protocol

from common.windows_job import Job, ended_times, start_in

from .accounting import Account, Accounts, Used
from .children import why_not_started
from .keeper import BUFFER, MAX_COMMANDS, PIECE, STRAGGLER_GRACE

_ENDING = ("TERM", "INT", "KILL", "HUP", "QUIT")  # a program without a window has no polite way to be ended


class Told(Protocol):
    """Who is told what becomes of the programs: the runner."""

    def keeper_state(self, connection: Any, keeper_id: str, commands: list[dict[str, Any]]) -> None: ...

    def kept(self, head: dict[str, Any], payload: bytes) -> None: ...


class _Stream:
    """One output stream, and the thread that reads it while there is room."""

    def __init__(self, name: str, pipe: IO[bytes]) -> None:
        self.name = name
        self.pipe = pipe
        self.buffer = bytearray()
        self.base = 0  # offset of buffer[0]
        self.sent = 0
        self.open = True
        self._room = threading.Condition()
        self._unacknowledged = 0

    @property
    def end(self) -> int:
        return self.base + len(self.buffer)

    def read_all(self, arrived: Callable[[bytes], None]) -> None:
        """In the thread: until the end, or until nobody needs it any more."""
        while True:
            try:
                data = os.read(self.pipe.fileno(), PIECE)
            except (OSError, ValueError):
                data = b""
            with self._room:
                self._unacknowledged += len(data)
                arrived(data)
                self._room.wait_for(lambda: self._unacknowledged < BUFFER or not self.open)
            if not data:
                return

    def acknowledged(self, offset: int) -> None:
        count = min(offset, self.end) - self.base
        if count > 0:
            del self.buffer[:count]
            self.base += count
            self.sent = max(self.sent, self.base)
            with self._room:
                self._unacknowledged -= count
                self._room.notify_all()

    def give_up(self) -> None:
        """What comes after this is not wanted."""
        self.open = False
        with self._room:
            self._room.notify_all()


class _Program:
    def __init__(self, command: str, job: Job, account: Account, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self.id, self.job, self.account, self.process = command, job, account, process
        self.started = time.monotonic()
        self.result: dict[str, Any] | None = None
        self.ended_by = ""
        self.told = False
        self.streams = {"stdout": _Stream("stdout", process.stdout), "stderr": _Stream("stderr", process.stderr)}

    @property
    def drained(self) -> bool:
        return all(not stream.open and stream.sent == stream.end for stream in self.streams.values())


class DirectKeeper:
    """Starts programs, gives out their output, counts what they use."""

    def __init__(self, reactor: Any, runner: Told, accounts: Accounts, start: Any = start_in, job: Any = Job) -> None:
        self._reactor = reactor
        self._runner = runner
        self._accounts = accounts
        self._start = start
        self._new_job = job
        self._programs: dict[str, _Program] = {}

    def begin(self, ready: Callable[[], None]) -> None:
        """Say that nothing runs yet."""
        self._runner.keeper_state(self, os.urandom(8).hex(), [])
        ready()

    def tell(self, head: dict[str, Any]) -> None:
        """What the agent asks for. The answers come later, never from within."""
        self._reactor.callLater(0, getattr(self, f"_do_{head['op']}"), head)

    # -- what the agent asks for

    def _do_spawn(self, head: dict[str, Any]) -> None:
        command = head["id"]
        if command in self._programs:
            return
        if len(self._programs) >= MAX_COMMANDS:
            self._say({"op": "refused", "id": command, "reason": f"{MAX_COMMANDS} commands are held already"})
            return
        try:
            program = self._programs[command] = self._spawn(head)
        except (OSError, ValueError) as error:
            self._say({"op": "refused", "id": command, "reason": why_not_started(head, error)})
            return
        self._say({"op": "started", "id": command, "pid": program.process.pid, "account": program.account.place})
        for stream in program.streams.values():
            self._in_thread(stream.read_all, self._later(self._arrived, program, stream))
        self._in_thread(self._wait, program)
        if head["deadline"] > 0:
            self._reactor.callLater(head["deadline"], self._deadline, program)

    def _spawn(self, head: dict[str, Any]) -> _Program:
        account = self._accounts.open(head["id"])
        job = self._new_job(account.place)
        try:
            with Path(head["stdin"] or os.devnull).open("rb") as stdin:
                process = self._start(
                    job,
                    head["argv"],
                    cwd=head["cwd"],
                    environment={**os.environ, **head["env"]},
                    files=(stdin, subprocess.PIPE, subprocess.PIPE),
                )
        except BaseException:
            job.close()
            account.close()
            raise
        account.started(process.pid)
        return _Program(head["id"], job, account, process)

    def _do_ack(self, head: dict[str, Any]) -> None:
        program = self._programs.get(head["id"])
        if program is not None:
            program.streams[head["stream"]].acknowledged(head["offset"])

    def _do_seek(self, head: dict[str, Any]) -> None:
        program = self._programs.get(head["id"])
        if program is not None:
            for name, stream in program.streams.items():
                stream.sent = min(max(head[name], stream.base), stream.end)
            program.told = False
            self._say({"op": "sought", "id": program.id})
            for stream in program.streams.values():
                self._push(program, stream)

    def _do_signal(self, head: dict[str, Any]) -> None:
        program = self._programs.get(head["id"])
        if program is None or program.result is not None:
            return
        if head["signal"] in _ENDING:
            self._end(program, head["signal"])
        elif head["signal"] == "STOP":
            program.job.suspend()
        elif head["signal"] == "CONT":
            program.job.resume()

    def _do_forget(self, head: dict[str, Any]) -> None:
        for command in head["ids"]:
            program = self._programs.get(command)
            if program is not None and program.result is not None:
                del self._programs[command]
                for stream in program.streams.values():
                    stream.give_up()
                program.job.close()

    def _do_quit(self, head: dict[str, Any]) -> None:
        self.end_all()

    def end_all(self) -> None:
        """End every program; nobody asks for them any more."""
        for program in self._programs.values():
            program.job.terminate()

    # -- what becomes of the programs

    def _end(self, program: _Program, by: str) -> None:
        program.ended_by = program.ended_by or by
        program.job.terminate()

    def _deadline(self, program: _Program) -> None:
        if program.result is None:
            self._end(program, "deadline")

    def _wait(self, program: _Program) -> None:
        code = program.process.wait()
        self._reactor.callFromThread(self._ended, program, code)

    def _ended(self, program: _Program, code: int) -> None:
        # The first process's own times are a part of the account's; they are all there is where no account is kept.
        used = max(program.account.used(), Used(*ended_times(program.process)), key=lambda each: each.cpu_s)
        program.account.close()
        result: dict[str, Any] = {
            "wall_s": time.monotonic() - program.started,
            "user_s": used.user_s,
            "system_s": used.system_s,
            "max_rss_bytes": used.rss_bytes,
        }
        if program.ended_by == "deadline":
            result.update(outcome="deadline")
        elif program.ended_by:
            result.update(outcome="signalled", signal=program.ended_by)
        else:
            result.update(outcome="exited", exit_code=code & 0xFFFFFFFF)
        program.result = result
        self._reactor.callLater(STRAGGLER_GRACE, self._drop_stragglers, program)
        self._maybe_tell_end(program)

    def _drop_stragglers(self, program: _Program) -> None:
        """A process that the program left behind holds its output open: do not wait for it for ever."""
        for stream in program.streams.values():
            if len(stream.buffer) < BUFFER:
                stream.give_up()
        if any(stream.open for stream in program.streams.values()):
            self._reactor.callLater(STRAGGLER_GRACE, self._drop_stragglers, program)
        self._maybe_tell_end(program)

    def _arrived(self, program: _Program, stream: _Stream, data: bytes) -> None:
        if not stream.open:
            return
        if data:
            stream.buffer += data
            self._push(program, stream)
        else:
            stream.give_up()
            self._maybe_tell_end(program)

    def _push(self, program: _Program, stream: _Stream) -> None:
        while stream.sent < stream.end:
            start = stream.sent - stream.base
            piece = bytes(stream.buffer[start : start + PIECE])
            self._say({"op": "output", "id": program.id, "stream": stream.name, "offset": stream.sent}, piece)
            stream.sent += len(piece)
        self._maybe_tell_end(program)

    def _maybe_tell_end(self, program: _Program) -> None:
        if program.result is not None and program.drained and not program.told:
            program.told = True
            lengths = {f"{name}_bytes": stream.end for name, stream in program.streams.items()}
            self._say({"op": "ended", "id": program.id, "pid": program.process.pid, **program.result, **lengths})

    def _say(self, head: dict[str, Any], payload: bytes = b"") -> None:
        self._runner.kept(head, payload)

    # -- threads

    def _later(self, call: Callable[..., None], *args: Any) -> Callable[..., None]:
        return lambda *more: self._reactor.callFromThread(call, *args, *more)

    def _in_thread(self, call: Callable[..., None], *args: Any) -> None:
        def run() -> None:
            with contextlib.suppress(Exception):  # the reactor has ended; so does the process
                call(*args)

        threading.Thread(target=run, name=call.__name__, daemon=True).start()
