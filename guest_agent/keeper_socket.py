"""The agent's end of the socket to its keeper (`keeper.py` says what goes over it).

Straight on the socket: what Twisted's own transport does around a write and a read is half of what a short command
costs the agent of an emulated machine.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet.interfaces import IReadDescriptor, IWriteDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

from . import keeper

READ = 256 * 1024
ATTEMPTS, PAUSE = 100, 0.05  # seconds: it was forked a moment ago and may not listen yet

_LENGTH = 4  # bytes before each frame


@implementer(IReadDescriptor, IWriteDescriptor)
class KeeperSocket:
    """`heard` gets the contents of each frame, `lost` is called once. `connected` is a socket that was made before."""

    def __init__(
        self,
        reactor: Any,
        path: Path,
        heard: Callable[[dict[str, Any], bytes], None],
        lost: Callable[[], None],
        connected: socket.socket | None = None,
    ) -> None:
        self._reactor = reactor
        self._path = str(path)
        self._heard = heard
        self._lost = lost
        self._connected = connected is not None
        self._socket = connected or socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._attempts = ATTEMPTS
        self._incoming = bytearray()
        self._outgoing = bytearray()

    def connect(self) -> None:
        """Begin; retries while the keeper starts."""
        try:
            if not self._connected:
                self._socket.connect(self._path)
        except OSError:
            self._attempts -= 1
            if self._attempts:
                self._reactor.callLater(PAUSE, self.connect)
            else:
                self._end()
            return
        self._socket.setblocking(False)
        self._reactor.addReader(self)

    def tell(self, head: dict[str, Any]) -> None:
        """Send a frame; what the socket does not take now goes when it does."""
        frame = keeper.pack(head)
        if self._outgoing:
            self._outgoing += frame
            return
        try:
            sent = self._socket.send(frame)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            return  # it has ended, which reading shows
        if sent < len(frame):
            self._outgoing += frame[sent:]
            self._reactor.addWriter(self)

    # -- the reactor's side

    def fileno(self) -> int:
        return self._socket.fileno()

    def logPrefix(self) -> str:
        return "keeper"

    def doWrite(self) -> None:
        try:
            sent = self._socket.send(self._outgoing)
            del self._outgoing[:sent]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._outgoing.clear()
        if not self._outgoing:
            self._reactor.removeWriter(self)

    def doRead(self) -> Failure | None:
        try:
            data = self._socket.recv(READ)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            data = b""
        if not data:
            self._reactor.removeReader(self)
            self._reactor.removeWriter(self)
            self._end()
            return None
        incoming = self._incoming
        incoming += data
        start, end = 0, len(incoming)
        while end - start >= _LENGTH:
            length = int.from_bytes(incoming[start : start + _LENGTH], "big")
            if end - start - _LENGTH < length:
                break
            start += _LENGTH
            self._heard(*keeper.unpack(bytes(incoming[start : start + length])))
            start += length
        del incoming[:start]
        return None

    def connectionLost(self, reason: Failure) -> None:
        """The reactor ends, or a frame was one that nobody understands."""
        self._end()

    def _end(self) -> None:
        if self._socket.fileno() >= 0:
            self._socket.close()
            self._lost()
