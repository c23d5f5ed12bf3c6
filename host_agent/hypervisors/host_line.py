"""The host's end of a VM's serial port: one line for the guest whenever its time has stood still.

    {"time": seconds since 1970, "restored": bool}\n

The guest sets its clock by it; after a restore its connections are broken, and it makes new ones without waiting for
their time-outs. A guest that does not listen loses nothing else.
"""

from __future__ import annotations

import json
import stat
import time
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure


class HostLine:
    """QEMU connects to it, as to the monitor."""

    def __init__(self, reactor: Any, place: Path) -> None:
        self._reactor = reactor
        self._path = place / "host.sock"
        self._listening: IListeningPort | None = None
        self._connection: _Connection | None = None
        self._due: bool | None = None  # a line that waits for the connection: restored or not

    def open(self) -> None:
        self._path.unlink(missing_ok=True)
        factory = Factory.forProtocol(lambda: _Connection(self))
        factory.noisy = False
        self._listening = self._reactor.listenUNIX(str(self._path), factory, mode=stat.S_IRUSR | stat.S_IWUSR)

    def say(self, *, restored: bool) -> None:
        """The guest's processors run again."""
        if self._connection is None or self._connection.transport is None:
            self._due = restored or bool(self._due)
            return
        line = json.dumps({"time": time.time(), "restored": restored})
        self._connection.transport.write(line.encode("ascii") + b"\n")

    def connected(self, connection: _Connection) -> None:
        self._connection = connection
        due, self._due = self._due, None
        if due is not None:
            self.say(restored=due)

    def lost(self, connection: _Connection) -> None:
        if self._connection is connection:
            self._connection = None

    def close(self) -> Deferred[None]:
        self._due = None
        if self._connection is not None and self._connection.transport is not None:
            self._connection.transport.loseConnection()
        listening, self._listening = self._listening, None
        if listening is None:
            return succeed(None)
        return (listening.stopListening() or succeed(None)).addCallback(lambda _: None)


class _Connection(Protocol):
    """What the guest writes is not for us."""

    def __init__(self, line: HostLine) -> None:
        self._line = line

    def connectionMade(self) -> None:
        self._line.connected(self)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._line.lost(self)
