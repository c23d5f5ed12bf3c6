"""The host's end of a VM's serial port: one line for the guest whenever its time has stood still.

    {"time": seconds since 1970, "seed": hexadecimal, "restored": bool, "config": the settings of a clone}

The guest sets its clock by it and seeds its random numbers, which another machine from the same state would share.
After a restore its connections are broken, and it makes new ones without waiting for their time-outs; at any other
line it tries at once what it would try later. A guest that does not listen loses nothing else.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IListeningPort, IProtocolFactory
from twisted.internet.protocol import Factory, connectionDone
from twisted.protocols.basic import LineOnlyReceiver
from twisted.python.failure import Failure

SEED_BYTES = 32


class HostLine:
    """QEMU connects to it, as to the monitor."""

    def __init__(self, listen: Callable[[IProtocolFactory], IListeningPort]) -> None:
        self._listen = listen
        self._listening: IListeningPort | None = None
        self._connection: _Connection | None = None
        self._due: dict[str, Any] | None = None  # a line that waits for the connection
        self._waiters: list[Deferred[None]] = []

    def open(self) -> None:
        factory = Factory.forProtocol(lambda: _Connection(self))
        factory.noisy = False
        self._listening = self._listen(factory)

    def say(self, *, restored: bool, config: str = "") -> None:
        """The guest's processors run again, or will at once."""
        message: dict[str, Any] = {"restored": restored, **({"config": config} if config else {})}
        if self._connection is None or self._connection.transport is None:
            self._due = {**(self._due or {}), **message, "restored": restored or bool(self._due)}
            return
        line = json.dumps({"time": time.time(), "seed": secrets.token_hex(SEED_BYTES), **message})
        self._connection.transport.write(line.encode("ascii") + b"\n")

    def guest_waits(self) -> Deferred[None]:
        """Fires when the guest says that it waits for its settings."""
        waiter: Deferred[None] = Deferred(self._waiters.remove)
        self._waiters.append(waiter)
        return waiter

    def heard(self, line: bytes) -> None:
        """A line of the guest's: nothing that it says matters, except that it waits."""
        if line == b'{"waiting": true}':
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                waiter.callback(None)

    def ended(self, failure: Exception) -> None:
        """So has its QEMU: who waits for the guest waits in vain."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.errback(failure)

    def connected(self, connection: _Connection) -> None:
        self._connection = connection
        due, self._due = self._due, None
        if due is not None:
            self.say(**due)

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


class _Connection(LineOnlyReceiver):
    delimiter = b"\n"
    MAX_LENGTH = 1024  # a guest that says more is cut off, and QEMU connects again

    def __init__(self, line: HostLine) -> None:
        self._line = line

    def connectionMade(self) -> None:
        self._line.connected(self)

    def lineReceived(self, line: bytes) -> None:
        self._line.heard(line)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._line.lost(self)
