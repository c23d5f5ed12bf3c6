"""The client of a host agent's control interface (`docs/control.md`) on plain sockets, without Twisted.

For a program with its own loop: `fileno()` says when to call `receive()`, and `start()` sends a request.
For a command of a person: `call()` sends and waits.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from common.errors import ConfigError, VMwrapperError
from common.files import endpoints_dir

MAX_LINE = 1 << 20
SEND_DEADLINE_S = 10.0

LONGEST_WAIT = 86400.0  # seconds at once: poll takes milliseconds in 31 bits
# Where there is poll: select looks at no descriptor from 1024 on, and a selector that lasts needs one of its own.
_Selector: type[selectors.BaseSelector] = getattr(selectors, "PollSelector", selectors.SelectSelector)

Update = Callable[[str, dict[str, Any]], None]
"""Called with an update's name and its data."""


class ControlError(VMwrapperError):
    """What a host agent answered instead of a result, or that it could not be asked.

    `code` is one of the interface's codes, or one of ours: `no_agent`, `closed`, `deadline`, `bad_answer`.
    """

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.code = code


End = Callable[[dict[str, Any] | None, ControlError | None], None]
"""Called once: with the result, or with None and the error."""


@attrs.frozen
class Endpoint:
    """Where a host agent listens: `socket`, or else `address` with `token`."""

    agent: str
    pid: int
    version: str = ""
    socket: str = ""
    address: tuple[str, int] = ("", 0)
    token: str = attrs.field(default="", repr=False)


def parse_endpoint(text: str | bytes) -> Endpoint:
    """An endpoint file's content, or the first line of a host agent's output. Raises ConfigError."""
    try:
        data = json.loads(text)
        host, port = data.get("address", ("", 0))
        endpoint = Endpoint(
            agent=str(data["agent"]),
            pid=int(data["pid"]),
            version=str(data.get("version", "")),
            socket=str(data.get("socket", "")),
            address=(str(host), int(port)),
            token=str(data.get("token", "")),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"this is not where a host agent listens: {text[:80]!r} ({error})") from None
    if not endpoint.socket and not (endpoint.address[0] in ("127.0.0.1", "::1") and endpoint.token):
        raise ConfigError("an endpoint needs a socket, or a loopback address and a token")
    return endpoint


def read_endpoint(path: Path) -> Endpoint:
    """Read an endpoint file. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            return parse_endpoint(file.read(65536))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "is the host agent running?") from None


def endpoints() -> list[Endpoint]:
    """Every host agent of this user that runs."""
    return [endpoint for endpoint, _file, alive in _endpoints() if alive]


def remove_dead_endpoints() -> list[Path]:
    """Host agents that were killed left files; gives those that were removed."""
    from .file_lock import ledger_lock

    with ledger_lock():  # an agent that is started again has the same files, and may be about to make them
        dead = [file for _endpoint, file, alive in _endpoints() if not alive]
        for file in dead:
            file.with_suffix(".sock").unlink(missing_ok=True)
            file.unlink(missing_ok=True)
    return dead


def _endpoints() -> Iterator[tuple[Endpoint, Path, bool]]:
    import psutil

    for file in sorted(endpoints_dir().glob("*.json")):
        try:
            endpoint = read_endpoint(file)
        except ConfigError:
            continue  # being written, or removed at this moment
        yield endpoint, file, psutil.pid_exists(endpoint.pid)


@attrs.define(eq=False)
class _Pending:
    on_update: Update | None
    on_end: End | None


class Answer:
    """What a request of `ControlClient.begin` leads to."""

    def __init__(self, client: ControlClient, call: str) -> None:
        self._client = client
        self._call = call
        self._began = time.monotonic()
        self._end: tuple[dict[str, Any] | None, ControlError | None] | None = None
        self.number = 0

    def ended(self, result: dict[str, Any] | None, error: ControlError | None) -> None:
        """It is here."""
        self._end = (result, error)

    def wait(self, until: float) -> dict[str, Any]:
        """The result, waited for until this time of the monotonic clock. Raises ControlError."""
        while self._end is None:
            if not self._client.wait_until(until):
                self._client.forget(self.number)
                seconds = round(until - self._began, 2)
                raise ControlError("deadline", f"the host agent did not answer {self._call!r} in {seconds:g} s")
        result, error = self._end
        if error is not None:
            raise error
        return result or {}


class ControlClient:
    """One connection. Not for several threads."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._selector = _Selector()
        self._selector.register(sock, selectors.EVENT_READ)
        self._buffer = bytearray()
        self._pending: dict[int, _Pending] = {}
        self._next = 1
        self.closed: ControlError | None = None  # why it is closed

    @classmethod
    def connect(cls, endpoint: Endpoint, deadline_s: float = 10.0) -> ControlClient:
        """Connect and say hello. Raises ControlError."""
        try:
            if endpoint.socket:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                sock.settimeout(deadline_s)
                try:
                    sock.connect(endpoint.socket)
                except BaseException:
                    sock.close()
                    raise
            else:
                sock = socket.create_connection(endpoint.address, deadline_s)
        except (OSError, AttributeError) as error:
            raise ControlError(
                "no_agent", f"the host agent {endpoint.agent} does not answer: {error}", "is it still running?"
            ) from None
        sock.settimeout(SEND_DEADLINE_S)
        client = cls(sock)
        try:
            client.call("hello", {"token": endpoint.token}, deadline_s=deadline_s)
        except ControlError:
            client.close()
            raise
        return client

    def fileno(self) -> int:
        """For a selector; -1 when closed."""
        return self._socket.fileno()

    def start(
        self,
        call: str,
        args: Mapping[str, Any] | None = None,
        on_update: Update | None = None,
        on_end: End | None = None,
    ) -> int:
        """Send a request and return its number. The answers come in `receive()`. Raises ControlError."""
        if self.closed:
            raise self.closed
        number = self._next
        request = {"id": number, "call": call, "args": dict(args or {}), "quiet": on_update is None}
        line = json.dumps(request).encode() + b"\n"
        if len(line) > MAX_LINE:
            raise ControlError("bad_request", f"the request {call!r} is longer than {MAX_LINE:,} bytes")
        self._next += 1
        self._pending[number] = _Pending(on_update, on_end)
        try:
            self._socket.sendall(line)
        except OSError as error:
            del self._pending[number]
            self._lost(ControlError("closed", f"the connection to the host agent broke: {error}"))
            assert self.closed is not None
            raise self.closed from None
        return number

    def receive(self) -> None:
        """Dispatch what has arrived, without waiting. A lost connection ends every request with `closed`."""
        while not self.closed and self._selector.select(0):
            try:
                data = self._socket.recv(65536)
            except OSError as error:
                self._lost(ControlError("closed", f"the connection to the host agent broke: {error}"))
                return
            if not data:
                self._lost(ControlError("closed", "the host agent closed the connection", "its log says why"))
                return
            self._buffer += data
            self._lines()

    def call(
        self,
        call: str,
        args: Mapping[str, Any] | None = None,
        on_update: Update | None = None,
        deadline_s: float = 60.0,
    ) -> dict[str, Any]:
        """Send a request and wait for its result, while other requests go on. Raises ControlError."""
        until = time.monotonic() + deadline_s
        return self.begin(call, args, on_update).wait(until)

    def begin(self, call: str, args: Mapping[str, Any] | None = None, on_update: Update | None = None) -> Answer:
        """Send a request, whose answer can be waited for: several may be under way. Never raises."""
        answer = Answer(self, call)
        try:
            answer.number = self.start(call, args, on_update, answer.ended)
        except ControlError as error:
            answer.ended(None, error)
        return answer

    def wait_until(self, until: float) -> bool:
        """Receive what comes next, and wait for it until this time of the monotonic clock. Whether it came."""
        left = until - time.monotonic()
        if left <= 0 or not self._wait(left):
            return False
        self.receive()
        return True

    def forget(self, number: int) -> None:
        """Nobody waits for the answer to a request any more."""
        self._pending.pop(number, None)

    def close(self) -> None:
        """End the connection; what runs goes on. Pending requests are forgotten."""
        self._pending.clear()
        if not self.closed:
            self._lost(ControlError("closed", "the connection to the host agent was closed"))

    def _wait(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not self.closed and (left := until - time.monotonic()) > 0:
            if self._selector.select(min(left, LONGEST_WAIT)):
                return True
        return bool(self.closed)

    def _lines(self) -> None:
        while not self.closed:
            end = self._buffer.find(b"\n")
            if end < 0:
                if len(self._buffer) > MAX_LINE:
                    self._bad(f"a line of more than {MAX_LINE:,} bytes")
                return
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._dispatch(line)

    def _dispatch(self, line: bytes) -> None:
        try:
            message = json.loads(line)
            number = message["id"]
        except (ValueError, KeyError, TypeError, RecursionError):
            self._bad(f"{line[:80]!r}")
            return
        if not isinstance(number, int):
            self._bad(f"{line[:80]!r}")
            return
        if "update" in message:
            pending = self._pending.get(number)
            data = message.get("data")
            if pending and pending.on_update and isinstance(data, dict):
                pending.on_update(str(message["update"]), data)
            return
        pending = self._pending.pop(number, None)
        if pending is None or pending.on_end is None:
            return  # nobody waits any more
        done, error = message.get("done"), message.get("error")
        if isinstance(done, dict):
            pending.on_end(done, None)
        elif isinstance(error, dict):
            text = str(error.get("message") or error.get("code") or "the host agent refused")
            pending.on_end(None, ControlError(str(error.get("code", "internal")), text, str(error.get("hint") or "")))
        else:
            pending.on_end(None, ControlError("bad_answer", f"the host agent answered {line[:80]!r}"))

    def _bad(self, what: str) -> None:
        self._lost(ControlError("bad_answer", f"the host agent sent {what}, which is no message of the interface"))

    def _lost(self, error: ControlError) -> None:
        if self.closed:
            return
        self.closed = error
        self._socket.close()
        pending, self._pending = self._pending, {}
        for request in pending.values():
            if request.on_end:
                request.on_end(None, error)
