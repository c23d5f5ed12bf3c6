"""A guest's port leads to the broker in use, byte for byte."""

from __future__ import annotations

from typing import Any

import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure

from host_agent.broker.forward import MOST_CONNECTIONS, Forwarder

LOOPBACK = "127.0.0.1"
SECONDS = 30.0
LISTEN: Any = reactor.listenTCP  # typed for server factories of one kind only


class Peer(Protocol):
    """Keeps what comes."""

    transport: Any

    def __init__(self) -> None:
        self.data = bytearray()
        self.gone: Deferred[None] = Deferred()
        self._waiting: tuple[int, Deferred[None]] | None = None

    def dataReceived(self, data: bytes) -> None:
        self.data += data
        if self._waiting is not None and len(self.data) >= self._waiting[0]:
            waiter, self._waiting = self._waiting[1], None
            waiter.callback(None)

    def has(self, size: int) -> Deferred[None]:
        waiter: Deferred[None] = Deferred()
        self._waiting = size, waiter
        waiter.addTimeout(SECONDS, reactor)
        self.dataReceived(b"")
        return waiter

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.gone.callback(None)


class Broker(Factory):
    """A server; `arrivals` fires with each connection."""

    noisy = False

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self._waiting: list[Deferred[Peer]] = []
        self.port: Any = LISTEN(0, self, interface=LOOPBACK)

    @property
    def place(self) -> tuple[str, int]:
        return LOOPBACK, self.port.getHost().port

    def buildProtocol(self, addr: object) -> Peer:
        peer = Peer()
        self.peers.append(peer)
        for waiter in self._waiting:
            waiter.callback(peer)
        self._waiting.clear()
        return peer

    def next(self) -> Deferred[Peer]:
        waiter: Deferred[Peer] = Deferred()
        self._waiting.append(waiter)
        return waiter.addTimeout(SECONDS, reactor)


class Guest:
    """A guest's way in."""

    def __init__(self, forwarder: Forwarder) -> None:
        self.port: Any = LISTEN(0, forwarder.factory(), interface=LOOPBACK)

    async def connect(self) -> Peer:
        endpoint = TCP4ClientEndpoint(reactor, LOOPBACK, self.port.getHost().port)
        peer = Peer()
        await endpoint.connect(Factory.forProtocol(lambda: peer))
        return peer


@pytest_twisted.ensureDeferred
async def test_bytes_pass_both_ways_and_ends_are_passed_on() -> None:
    forwarder, broker = Forwarder(reactor), Broker()
    guest = Guest(forwarder)
    forwarder.lead_to(*broker.place)
    arrival = broker.next()
    near = await guest.connect()
    data = bytes(range(256)) * 4000
    near.transport.write(data)
    far = await arrival
    await far.has(len(data))
    assert bytes(far.data) == data
    far.transport.write(data[::-1])
    far.transport.loseConnection()  # what was written before must still arrive
    await near.has(len(data))
    assert bytes(near.data) == data[::-1]
    await near.gone.addTimeout(SECONDS, reactor)
    await guest.port.stopListening()
    await broker.port.stopListening()


@pytest_twisted.ensureDeferred
async def test_guests_follow_when_the_broker_in_use_is_another() -> None:
    forwarder, first, second = Forwarder(reactor), Broker(), Broker()
    guest = Guest(forwarder)
    forwarder.lead_to(*first.place)
    arrival = first.next()
    near = await guest.connect()
    await arrival
    forwarder.lead_to(*first.place)  # the same: nobody is disturbed
    assert not near.gone.called
    forwarder.lead_to(*second.place)
    await near.gone.addTimeout(SECONDS, reactor)
    arrival = second.next()
    near = await guest.connect()
    await arrival
    forwarder.cut()
    await near.gone.addTimeout(SECONDS, reactor)
    for port in (guest.port, first.port, second.port):
        await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_without_a_broker_a_guest_is_told_at_once() -> None:
    forwarder, broker = Forwarder(reactor), Broker()
    guest = Guest(forwarder)
    near = await guest.connect()
    await near.gone.addTimeout(SECONDS, reactor)
    place = broker.place
    await broker.port.stopListening()
    forwarder.lead_to(*place)
    near = await guest.connect()
    await near.gone.addTimeout(SECONDS, reactor)
    await guest.port.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_guest_has_a_few_connections_and_no_more() -> None:
    forwarder, broker = Forwarder(reactor), Broker()
    guest, other = Guest(forwarder), Guest(forwarder)
    forwarder.lead_to(*broker.place)
    peers = [await guest.connect() for _ in range(MOST_CONNECTIONS)]
    surplus = await guest.connect()
    await surplus.gone.addTimeout(SECONDS, reactor)
    arrival = broker.next()
    peers.append(await other.connect())
    await arrival
    forwarder.cut()
    for peer in peers:
        await peer.gone.addTimeout(SECONDS, reactor)
    for port in (guest.port, other.port, broker.port):
        await port.stopListening()
