"""What is written to one client: collected while the broker is at work, then given to its socket at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from twisted.internet.interfaces import IPushProducer
from twisted.internet.tcp import Connection
from zope.interface import implementer

from host_agent.broker.queues import Message

if TYPE_CHECKING:
    from host_agent.broker.embedded import EmbeddedBroker

Part = bytes | bytearray | memoryview

_TURN_BYTES = 64 * 1024
"""When so much is written, the others have their turn before more is delivered."""

_JOINED_BYTES = 64 * 1024
_SEPARATE_PARTS = 256
"""Up to this size, and from so many parts on, one joined write is cheaper than a list of buffers."""


@implementer(IPushProducer)
class Outlet:
    """Also the producer of what the transport sends.

    A socket is written to at once, which spares the reactor two changes of what it waits for, a pass, and a copy; the
    transport only says when it takes more. Where that is not a plain socket, everything goes through it.
    """

    __slots__ = (
        "_broker",
        "_drained",
        "_ended",
        "_held",
        "_parts",
        "_size",
        "_socket",
        "_transport",
        "_wrote",
        "paused",
    )

    def __init__(self, broker: EmbeddedBroker, drained: Callable[[], None]) -> None:
        """`drained`: the client has taken everything that was written, so there may be more."""
        self.paused = False
        """Nothing may be delivered to this client now."""
        self._broker = broker
        self._drained = drained
        self._transport: Any = None
        self._socket: Any = None
        self._parts: list[Part] = []
        self._size = 0
        self._held = False  # the client has not read what was written
        self._wrote = False
        self._ended = False

    def attach(self, transport: Any) -> None:
        """Write to this."""
        self._transport = transport
        if isinstance(transport, Connection) and not transport.TLS:
            self._socket = transport.getHandle()
        # A pull producer is asked whenever the socket can take something and the transport has nothing for it.
        transport.registerProducer(self, self._socket is None)

    def message(self, start: bytes, message: Message) -> None:
        """Write a MESSAGE frame that begins with `start`."""
        parts = self._parts
        if not parts:
            self._broker.soon(self.flush)
        parts += (start, message.head, *message.body, b"\0")
        self._size += len(start) + message.length
        if self._size > _TURN_BYTES:
            self.paused = True

    def write(self, data: bytes) -> None:
        """Write anything."""
        if not self._parts:
            self._broker.soon(self.flush)
        self._parts.append(data)
        self._size += len(data)

    def flush(self) -> None:
        """Give to the socket what was written."""
        parts, size, transport = self._parts, self._size, self._transport
        if not parts or transport is None or (self._held and self._socket is not None):
            return
        self._parts, self._size, self._wrote = [], 0, True
        if self._socket is None:
            transport.write(b"".join(parts))
        else:
            sent = self._send(parts, size)
            if sent < size:
                self._parts, self._size = _rest(parts, sent), size - sent
                self._held = self.paused = True
                transport.startWriting()  # when the socket takes more, `resumeProducing` is called
            size = sent
        self._broker.totals.bytes_sent += size
        if self.paused and not self._held:
            self._broker.reactor.callLater(0, self._go_on)

    def is_silent(self) -> bool:
        """Whether nothing was written since this was asked last."""
        silent, self._wrote = not (self._wrote or self._parts), False
        return silent

    def end(self) -> None:
        """Leave it to the transport to write what there is, and take no messages any more."""
        self.flush()
        if self._parts and self._transport is not None:
            self._transport.write(b"".join(self._parts))
            self._parts = []
        self.paused = self._ended = True

    def _send(self, parts: list[Part], size: int) -> int:
        try:
            if size <= _JOINED_BYTES or len(parts) > _SEPARATE_PARTS or not hasattr(self._socket, "sendmsg"):
                return int(self._socket.send(b"".join(parts)))
            return int(self._socket.sendmsg(parts))
        except OSError:
            return 0  # full, or broken, which the transport finds out

    def _go_on(self) -> None:
        if not self._held and not self._ended:
            self.paused = False
            self._broker.work(self._drained)

    # Called by the transport

    def pauseProducing(self) -> None:
        """The client does not read fast enough: deliver nothing more for now."""
        self._held = self.paused = True

    def resumeProducing(self) -> None:
        """The transport has nothing left to write."""
        self._held = False
        self.flush()
        self._go_on()

    def stopProducing(self) -> None:
        """The connection is going away."""
        self._transport = self._socket = None
        self._parts.clear()
        self.paused = self._ended = True


def _rest(parts: list[Part], sent: int) -> list[Part]:
    """What is left of them after so many bytes."""
    for number, part in enumerate(parts):
        if sent < len(part):
            return [memoryview(part)[sent:], *parts[number + 1 :]]
        sent -= len(part)
    return []
