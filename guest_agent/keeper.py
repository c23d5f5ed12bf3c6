"""The keeper: a small process of its own that starts the commands, holds their output and reaps them.

It exists for three reasons. It outlives the agent, so that a restarted agent finds its commands running and their
output complete. It is small and has no threads, so that starting a program costs one vfork. And only a program's
parent can learn its CPU time and memory (`wait4`), which Twisted's own reaper throws away, or give it an account
(`accounting.py`) before it runs.

The agent talks to it over a Unix socket in frames: four bytes of length (big-endian), a JSON object on one line,
and for output a newline and the raw bytes. Only the standard library is imported here.

    agent → keeper   spawn  id argv env cwd stdin deadline      seek   id stdout stderr   (send again from there)
                     ack    id stream offset                    signal id signal
                     forget ids                                 quit
    keeper → agent   state  keeper commands: [id pid account running stdout stderr]  (first, on every connection)
                     started id pid account (if it runs for a moment)   refused id reason
                     output id stream offset + bytes                    sought id (what follows begins there)
                     ended  id pid outcome … (after the last byte of output)
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import selectors
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any, Callable

from .accounting import Used, accounts
from .children import Child, Stream, signal_name, spawn, why_not_started

BUFFER = 1024 * 1024  # bytes of one stream that wait for the host; then the program's pipe fills and it waits
PIECE = 64 * 1024  # bytes in one output frame
BATCH = 0.02  # seconds: the first piece goes at once, what follows is sent together
FIRST_LOOK = 0.02  # seconds after its start that a program's output is first looked for; at its end it is read anyway
STARTED_AFTER = 0.1  # seconds: of a program that ends sooner, its end alone is told
STRAGGLER_GRACE = 0.25  # seconds that a grandchild may hold the output open after the program ended
IDLE_EXIT = 60.0  # seconds without an agent and without a running command
FIRST_AGENT = 600.0  # the same before the first agent, which may wait for its settings
MAX_FRAME = 4 * 1024 * 1024
MAX_COMMANDS = 1024

_LENGTH = struct.Struct(">I")
_to_json = json.JSONEncoder(separators=(",", ":")).encode


def pack(head: dict[str, Any], payload: bytes = b"") -> bytes:
    """A frame for the socket between agent and keeper."""
    line = _to_json(head).encode("ascii")
    body = b"%b\n%b" % (line, payload) if payload else line
    return _LENGTH.pack(len(body)) + body


def unpack(body: bytes) -> tuple[dict[str, Any], bytes]:
    """The contents of a frame (without its length)."""
    line, _, payload = body.partition(b"\n")
    head: dict[str, Any] = json.loads(line.decode())
    return head, payload


class Keeper:
    """The keeper's loop. `path` is the socket on which the agent connects; its directory is private."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._id = os.urandom(8).hex()
        self._selector = selectors.DefaultSelector()
        self._commands: dict[str, Child] = {}
        self._running: dict[int, Child] = {}  # by pid
        self._accounts = accounts()
        self._agent: socket.socket | None = None
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._timers: list[tuple[float, int, Callable[[], None], Child | None]] = []
        self._timer_count = 0
        self._alone_since = time.monotonic()
        self._patience = FIRST_AGENT
        self._quit = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        self._listener.bind(str(path))
        self._listener.listen(2)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    # -- the loop

    def run(self) -> None:
        """Serve until told to quit, or until nobody needs us any more."""
        wake_read, wake_write = socket.socketpair()
        wake_read.setblocking(False)
        wake_write.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
        self._selector.register(wake_read, selectors.EVENT_READ, lambda: self._reap(wake_read))
        while not self._quit:
            for key, mask in self._selector.select(self._wait_time()):
                if mask & selectors.EVENT_WRITE:
                    self._flush()
                if mask & selectors.EVENT_READ:
                    key.data()
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2]()
            if self._agent is None and self._idle_for(now) >= self._patience:
                self._quit = True
        self._kill_all()
        self._accounts.close()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _idle_for(self, now: float) -> float:
        return 0.0 if self._running else now - self._alone_since

    def _wait_time(self) -> float | None:
        now = time.monotonic()
        # What was to be done while a program runs wakes nobody after its end.
        while self._timers and (command := self._timers[0][3]) is not None and not command.running:
            heapq.heappop(self._timers)
        waits = [self._timers[0][0] - now] if self._timers else []
        if self._agent is None:
            waits.append(self._patience)
        return max(0.0, min(waits)) if waits else None

    def _after(self, seconds: float, action: Callable[[], None], running: Child | None = None) -> None:
        """`running`: if that still runs then."""
        self._timer_count += 1
        heapq.heappush(self._timers, (time.monotonic() + seconds, self._timer_count, action, running))

    # -- the agent's connection

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            self._drop_agent()
            connection.setblocking(False)
            self._agent = connection
            self._selector.register(connection, selectors.EVENT_READ, self._receive)
            for command in self._commands.values():
                command.told = False
                for stream in command.streams.values():
                    stream.sent = stream.base
            self._tell(
                {"op": "state", "keeper": self._id, "commands": [self._describe(c) for c in self._commands.values()]}
            )

    def _describe(self, command: Child) -> dict[str, Any]:
        return {
            "id": command.id,
            "pid": command.pid,
            "account": command.account.place,
            "running": command.running,
            "stdout": command.streams["stdout"].base,
            "stderr": command.streams["stderr"].base,
        }

    def _drop_agent(self) -> None:
        if self._agent is not None:
            self._selector.unregister(self._agent)
            self._agent.close()
            self._agent = None
            self._patience = IDLE_EXIT
        self._incoming.clear()
        self._outgoing.clear()
        self._alone_since = time.monotonic()

    def _receive(self) -> None:
        assert self._agent is not None
        try:
            data = self._agent.recv(256 * 1024)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._drop_agent()
            return
        self._incoming += data
        while len(self._incoming) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._incoming)
            if length > MAX_FRAME:
                self._drop_agent()
                return
            if len(self._incoming) < _LENGTH.size + length:
                return
            body = bytes(self._incoming[_LENGTH.size : _LENGTH.size + length])
            del self._incoming[: _LENGTH.size + length]
            head, _ = unpack(body)
            getattr(self, f"_do_{head['op']}")(head)

    def _tell(self, head: dict[str, Any], payload: bytes = b"") -> None:
        if self._agent is not None:
            self._outgoing += pack(head, payload)
            self._flush()

    def _flush(self) -> None:
        if self._agent is None:
            return
        try:
            while self._outgoing:
                count = self._agent.send(self._outgoing)
                del self._outgoing[:count]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            # It is gone, but what it said before, a `quit` perhaps, is still to be read; its end comes after that.
            self._outgoing.clear()
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outgoing else 0)
        if events != self._selector.get_key(self._agent).events:
            self._selector.modify(self._agent, events, self._receive)

    # -- what the agent asks for

    def _do_spawn(self, head: dict[str, Any]) -> None:
        command_id = head["id"]
        if command_id in self._commands:
            return
        if len(self._commands) >= MAX_COMMANDS:
            self._tell({"op": "refused", "id": command_id, "reason": f"{MAX_COMMANDS} commands are held already"})
            return
        try:
            command = self._commands[command_id] = spawn(head, self._accounts)
        except (OSError, ValueError) as error:
            self._tell({"op": "refused", "id": command_id, "reason": why_not_started(head, error)})
            return
        self._running[command.pid] = command
        for stream in command.streams.values():
            os.set_blocking(stream.fd, False)
        # Not at once: the end of a short program's output and its own would wake us twice, a millisecond apart.
        self._after(FIRST_LOOK, lambda: self._begin_to_watch(command), command)
        if head["deadline"] > 0:
            self._after(head["deadline"], lambda: self._deadline(command), command)
        self._after(STARTED_AFTER, lambda: self._tell_started(command), command)

    def _tell_started(self, command: Child) -> None:
        if command.running:
            self._tell({"op": "started", "id": command.id, "pid": command.pid, "account": command.account.place})

    def _do_ack(self, head: dict[str, Any]) -> None:
        command = self._commands.get(head["id"])
        if command is not None:
            stream = command.streams[head["stream"]]
            count = min(head["offset"], stream.end) - stream.base
            if count > 0:
                del stream.buffer[:count]
                stream.base += count
                stream.sent = max(stream.sent, stream.base)
                self._watch(command, stream)

    def _do_seek(self, head: dict[str, Any]) -> None:
        command = self._commands.get(head["id"])
        if command is not None:
            for name, stream in command.streams.items():
                stream.sent = min(max(head[name], stream.base), stream.end)
                stream.next_send = 0.0
            command.told = False
            self._tell({"op": "sought", "id": command.id})
            for stream in command.streams.values():
                self._push(command, stream)

    def _do_signal(self, head: dict[str, Any]) -> None:
        command = self._commands.get(head["id"])
        if command is not None and command.running:
            self._kill(command, getattr(signal, f"SIG{head['signal']}"))

    def _do_forget(self, head: dict[str, Any]) -> None:
        for command_id in head["ids"]:
            command = self._commands.get(command_id)
            if command is not None and not command.running:
                for stream in command.streams.values():
                    self._close(stream)
                command.account.close()
                del self._commands[command_id]

    def _do_quit(self, head: dict[str, Any]) -> None:
        self._quit = True

    # -- the programs

    def _kill(self, command: Child, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(command.pid, number)

    def _kill_all(self) -> None:
        for command in self._running.values():
            self._kill(command, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(command.pid, 0)

    def _deadline(self, command: Child) -> None:
        if command.running:
            command.past_deadline = True
            self._kill(command, signal.SIGKILL)

    def _reap(self, wake: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            wake.recv(4096)
        # One signal may stand for several ends. Whoever has ended is asked for, not each that runs whether it has.
        with contextlib.suppress(ChildProcessError):
            while self._running:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
                if not pid:
                    break
                if (command := self._running.pop(pid, None)) is not None:
                    self._ended(command, status, usage)

    def _ended(self, command: Child, status: int, usage: Any) -> None:
        command.running = False
        self._alone_since = time.monotonic()
        unit = 1 if sys.platform == "darwin" else 1024
        # Where the account knows less (a child of the tree that others waited for), `wait4` has the rest.
        used = max(command.account.total(), Used(usage.ru_utime, usage.ru_stime), key=lambda each: each.cpu_s)
        command.result = {
            "wall_s": time.monotonic() - command.started,
            "user_s": used.user_s,
            "system_s": used.system_s,
            "max_rss_bytes": usage.ru_maxrss * unit,
        }
        if command.past_deadline:
            command.result.update(outcome="deadline")
        elif os.WIFSIGNALED(status):
            command.result.update(outcome="signalled", signal=signal_name(os.WTERMSIG(status)))
        else:
            command.result.update(outcome="exited", exit_code=os.WEXITSTATUS(status))
        for stream in command.streams.values():
            self._read(command, stream)
        if any(stream.fd >= 0 for stream in command.streams.values()):
            self._after(STRAGGLER_GRACE, lambda: self._drop_stragglers(command))
        self._maybe_tell_end(command)
        command.account.close()  # the host need not wait for that
        self._accounts.prepare()

    def _drop_stragglers(self, command: Child) -> None:
        """A process that the program left behind holds its output open: do not wait for it for ever."""
        for stream in command.streams.values():
            if stream.fd >= 0 and len(stream.buffer) < BUFFER:
                self._read(command, stream)
                if len(stream.buffer) < BUFFER:
                    self._close(stream)
        if any(stream.fd >= 0 for stream in command.streams.values()):
            self._after(STRAGGLER_GRACE, lambda: self._drop_stragglers(command))
        self._maybe_tell_end(command)

    def _maybe_tell_end(self, command: Child) -> None:
        if command.result is not None and command.drained and not command.told and self._agent is not None:
            command.told = True
            lengths = {f"{name}_bytes": stream.end for name, stream in command.streams.items()}
            self._tell({"op": "ended", "id": command.id, "pid": command.pid, **command.result, **lengths})

    # -- their output

    def _begin_to_watch(self, command: Child) -> None:
        if command.running:
            for stream in command.streams.values():
                self._watch(command, stream)

    def _watch(self, command: Child, stream: Stream) -> None:
        """Read the pipe while there is room; without room the program waits in its write()."""
        if stream.fd < 0:
            return
        watched = stream.fd in self._selector.get_map()
        if len(stream.buffer) < BUFFER and not watched:
            self._selector.register(stream.fd, selectors.EVENT_READ, lambda: self._read(command, stream))
        elif len(stream.buffer) >= BUFFER and watched:
            self._selector.unregister(stream.fd)

    def _read(self, command: Child, stream: Stream) -> None:
        while stream.fd >= 0 and len(stream.buffer) < BUFFER:
            try:
                data = os.read(stream.fd, PIECE)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                data = b""
            if not data:
                self._close(stream)
                break
            stream.buffer += data
            if command.running:
                break  # the others' turn
        self._watch(command, stream)
        self._push(command, stream)
        self._maybe_tell_end(command)

    def _close(self, stream: Stream) -> None:
        if stream.fd >= 0:
            if stream.fd in self._selector.get_map():
                self._selector.unregister(stream.fd)
            os.close(stream.fd)
            stream.fd = -1

    def _push(self, command: Child, stream: Stream) -> None:
        """Send what the agent has not got: at once after a pause, else in batches."""
        if self._agent is None or stream.sent == stream.end:
            self._maybe_tell_end(command)
            return
        now = time.monotonic()
        if command.running and now < stream.next_send and stream.end - stream.sent < PIECE // 2:
            return  # the timer set with next_send will send it
        stream.next_send = now + BATCH
        if command.running:
            self._after(BATCH + 0.001, lambda: self._push(command, stream))
        while stream.sent < stream.end:
            start = stream.sent - stream.base
            piece = bytes(stream.buffer[start : start + PIECE])
            self._tell({"op": "output", "id": command.id, "stream": stream.name, "offset": stream.sent}, piece)
            stream.sent += len(piece)
        self._maybe_tell_end(command)


def start_keeper(path: Path) -> None:
    """Fork the keeper off, as a child of init. Call this before threads or heavy imports exist."""
    sys.stdout.flush()
    sys.stderr.flush()
    first = os.fork()
    if first:
        os.waitpid(first, 0)
        return
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        # Whoever reads the agent's own output must not wait for the keeper's end.
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.closerange(3, 1 << 16)  # what we were given is not for the programs
        Keeper(path).run()
    except BaseException:
        import traceback

        path.with_suffix(".crash").write_text(traceback.format_exc())
    finally:
        os._exit(0)
