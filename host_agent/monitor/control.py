"""The client of a host agent's control interface (`docs/control.md`) on Twisted's reactor."""

from __future__ import annotations

import json
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, UNIXClientEndpoint
from twisted.internet.error import ConnectError
from twisted.internet.protocol import Factory, connectionDone
from twisted.protocols.basic import LineOnlyReceiver
from twisted.python.failure import Failure

from host_agent.control_client import MAX_LINE, ControlError, Endpoint

CONNECT_SECONDS = 10.0
CALL_SECONDS = 30.0
MOST_CALLS = 64  # under way at once


class ControlConnection(LineOnlyReceiver):
    """One connection; `call` asks for something that has no updates of interest."""

    delimiter = b"\n"
    MAX_LENGTH = MAX_LINE

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._pending: dict[int, Deferred[dict[str, Any]]] = {}
        self._next = 1
        self.closed: ControlError | None = None
        self.lost: Deferred[None] = Deferred()

    def call(self, name: str, args: dict[str, Any] | None = None, seconds: float = CALL_SECONDS) -> Deferred[Any]:
        """Fires with the result; fails with ControlError."""
        answer: Deferred[dict[str, Any]] = Deferred()
        if self.closed is not None or self.transport is None:
            answer.errback(self.closed or ControlError("closed", "the connection is closed"))
            return answer
        if len(self._pending) >= MOST_CALLS:
            answer.errback(ControlError("deadline", f"{MOST_CALLS} calls wait for the host agent's answer"))
            return answer
        number, self._next = self._next, self._next + 1
        self._pending[number] = answer
        line = json.dumps({"id": number, "call": name, "args": args or {}}).encode() + b"\n"
        self.transport.write(line)

        def late(value: Any, timeout: float) -> Any:
            raise ControlError("deadline", f"the host agent did not answer {name!r} in {timeout:g} s")

        answer.addTimeout(seconds, self._reactor, late)
        return answer.addBoth(self._done, number)

    def _done(self, result: Any, number: int) -> Any:
        self._pending.pop(number, None)
        return result

    def lineReceived(self, line: bytes) -> None:
        try:
            message = json.loads(line)
            answer = self._pending.get(message["id"])
        except (ValueError, KeyError, TypeError, RecursionError):
            self._bad(f"{line[:80]!r}")
            return
        done, error = message.get("done"), message.get("error")
        if answer is None or (done is None and error is None):
            return  # an update, or an answer that came too late
        if isinstance(done, dict):
            answer.callback(done)
        elif isinstance(error, dict):
            text = str(error.get("message") or "the host agent refused")
            answer.errback(ControlError(str(error.get("code", "internal")), text, str(error.get("hint") or "")))
        else:
            self._bad(f"{line[:80]!r}")

    def lineLengthExceeded(self, line: bytes) -> None:
        self._bad(f"a line of more than {MAX_LINE} bytes")

    def _bad(self, what: str) -> None:
        self.closed = ControlError("bad_answer", f"the host agent sent {what}, which is no message of the interface")
        transport: Any = self.transport
        transport.abortConnection()

    def close(self) -> None:
        transport: Any = self.transport
        if transport is not None:
            transport.loseConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.closed = self.closed or ControlError("closed", "the host agent closed the connection", "its log says why")
        pending, self._pending = self._pending, {}
        for answer in pending.values():
            answer.errback(self.closed)
        self.lost.callback(None)


@attrs.define
class _Connections(Factory):
    reactor: Any
    noisy = False

    def buildProtocol(self, addr: object) -> ControlConnection:
        return ControlConnection(self.reactor)


async def connect(reactor: Any, endpoint: Endpoint) -> ControlConnection:
    """Connect and say hello. ControlError."""
    way: Any = (
        UNIXClientEndpoint(reactor, endpoint.socket, timeout=CONNECT_SECONDS)
        if endpoint.socket
        else TCP4ClientEndpoint(reactor, *endpoint.address, timeout=int(CONNECT_SECONDS))
    )
    try:
        connection: ControlConnection = await way.connect(_Connections(reactor))
    except (ConnectError, OSError) as error:
        raise ControlError(
            "no_agent", f"the host agent {endpoint.agent} does not answer: {error}", "is it still running?"
        ) from None
    try:
        await connection.call("hello", {"token": endpoint.token}, CONNECT_SECONDS)
    except ControlError:
        connection.close()
        raise
    return connection
