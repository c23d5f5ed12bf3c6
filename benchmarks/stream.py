"""A bare TCP stream between a guest and the host agent's process, as its copies go: the limit of copies."""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Protocol
from zope.interface import implementer

from host_agent.hypervisors.qemu import GATEWAY

STREAM_PORT = 61699
PIECE = bytes(256 * 1024)

# In the guest; its clock starts when Python has started. Asks with a line: which way, how many bytes.
GUEST_END = f"""
import socket, sys, time
began = time.perf_counter()
stream = socket.create_connection(({GATEWAY!r}, {STREAM_PORT}))
buffer, left = memoryview(bytearray(1 << 20)), int(sys.argv[2])
stream.sendall(" ".join(sys.argv[1:]).encode() + b"\\n")
while left:
    left -= stream.recv_into(buffer) if sys.argv[1] == "in" else stream.send(buffer[:left])
if sys.argv[1] == "out":
    stream.recv(1)
print(time.perf_counter() - began)
"""


@implementer(IPushProducer)
class Stream(Protocol):
    """The host's end: sends as many bytes as it is asked for, or takes them and says so."""

    _asked = b""
    _inwards = False
    _left = -1
    _paused = False

    def dataReceived(self, data: bytes) -> None:
        transport: Any = self.transport
        if self._left < 0:
            self._asked += data
            words, found, data = self._asked.partition(b"\n")
            if not found:
                return
            way, count = words.split()
            self._inwards, self._left = way == b"in", int(count)
            if self._inwards:
                transport.registerProducer(self, True)
                self.resumeProducing()
        if not self._inwards:
            self._left -= len(data)
            if not self._left:
                transport.write(b".")

    def resumeProducing(self) -> None:
        transport: Any = self.transport
        self._paused = False
        while self._left and not self._paused:
            piece = PIECE[: self._left]
            self._left -= len(piece)
            transport.write(piece)
        if not self._left:
            transport.unregisterProducer()

    def pauseProducing(self) -> None:
        self._paused = True

    def stopProducing(self) -> None:
        self._left = 0
