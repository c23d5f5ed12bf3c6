"""A guest's connection, carried byte for byte to the broker that is in use now."""

from __future__ import annotations

from typing import Any

from twisted.internet.endpoints import HostnameEndpoint
from twisted.internet.interfaces import IProtocolFactory
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

CONNECT_SECONDS = 10.0
MOST_CONNECTIONS = 8  # of one guest: it needs one, and another while the old one dies


class Forwarder:
    """All forwarded connections of a host agent."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._place: tuple[str, int] | None = None
        self._open: set[_GuestEnd] = set()

    def lead_to(self, host: str, port: int) -> None:
        """The broker for new connections; those to another one end, so that their guests follow."""
        if (host, port) != self._place:
            self._place = host, port
            self.cut()

    def cut(self) -> None:
        """End every connection."""
        for end in list(self._open):
            end.end()

    def factory(self) -> IProtocolFactory:
        """Serves one guest."""
        return _GuestFactory(self)

    def connect(self, end: _GuestEnd) -> None:
        if self._place is None:
            end.end()  # the guest tries again by itself
            return
        self._open.add(end)
        endpoint = HostnameEndpoint(self._reactor, *self._place, timeout=CONNECT_SECONDS)
        endpoint.connect(_BrokerFactory(end)).addErrback(end.unreachable)

    def ended(self, end: _GuestEnd) -> None:
        self._open.discard(end)


class _GuestFactory(Factory):
    noisy = False

    def __init__(self, forwarder: Forwarder) -> None:
        self.forwarder = forwarder
        self.connections = 0

    def buildProtocol(self, addr: object) -> Protocol | None:
        if self.connections >= MOST_CONNECTIONS:
            return None
        self.connections += 1
        return _GuestEnd(self)


class _End(Protocol):
    """One of two connections that are each other's producer, so that neither is read faster than the other writes."""

    transport: Any
    peer: _End | None = None
    over = False

    def dataReceived(self, data: bytes) -> None:
        if self.peer is not None:
            self.peer.transport.write(data)

    def end(self) -> None:
        if self.transport is not None:
            self.transport.abortConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.over = True
        peer, self.peer = self.peer, None
        if peer is not None:
            # Not aborted: what was written before is delivered, as a broker's ERROR frame.
            peer.transport.unregisterProducer()
            peer.transport.loseConnection()
            peer.peer = None


class _GuestEnd(_End):
    _log = Logger()

    def __init__(self, factory: _GuestFactory) -> None:
        self._factory = factory

    def connectionMade(self) -> None:
        self.transport.pauseProducing()
        self._factory.forwarder.connect(self)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._factory.connections -= 1
        self._factory.forwarder.ended(self)
        super().connectionLost(reason)

    def unreachable(self, failure: Failure) -> None:
        self._log.debug("a guest's connection ends, the broker: {why}", why=failure.getErrorMessage())
        self.end()


class _BrokerFactory(Factory):
    noisy = False

    def __init__(self, guest: _GuestEnd) -> None:
        self._guest = guest

    def buildProtocol(self, addr: object) -> _BrokerEnd:
        return _BrokerEnd(self._guest)


class _BrokerEnd(_End):
    def __init__(self, guest: _GuestEnd) -> None:
        self._guest = guest

    def connectionMade(self) -> None:
        guest = self._guest
        if guest.over:
            self.end()
            return
        self.transport.setTcpNoDelay(True)
        self.peer, guest.peer = guest, self
        self.transport.registerProducer(guest.transport, True)
        guest.transport.registerProducer(self.transport, True)
        guest.transport.resumeProducing()
