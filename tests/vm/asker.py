"""The host's end of the conversation with `standin/main.py`."""

from __future__ import annotations

import json
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredQueue
from twisted.internet.protocol import Factory
from twisted.protocols.basic import LineOnlyReceiver

ANSWER_DEADLINE = 60.0  # seconds


class Asker(LineOnlyReceiver):
    """One connection of the guest's."""

    delimiter = b"\n"
    MAX_LENGTH = 1 << 20

    def __init__(self, guests: DeferredQueue[Asker]) -> None:
        self._guests = guests
        self._lines: DeferredQueue[Any] = DeferredQueue()

    def connectionMade(self) -> None:
        self._guests.put(self)

    def lineReceived(self, line: bytes) -> None:
        self._lines.put(json.loads(line))

    def next(self) -> Deferred[Any]:
        return self._lines.get().addTimeout(ANSWER_DEADLINE, reactor)

    def ask(self, line: str) -> Deferred[Any]:
        self.say(line)
        return self.next()

    def say(self, line: str) -> None:
        self.sendLine(line.encode())  # type: ignore[no-untyped-call]

    def hang_up(self) -> None:
        transport: Any = self.transport
        transport.abortConnection()


class AskerFactory(Factory):
    """`guests` gets every connection."""

    noisy = False

    def __init__(self) -> None:
        self.guests: DeferredQueue[Asker] = DeferredQueue()

    def buildProtocol(self, addr: object) -> Asker:
        return Asker(self.guests)
