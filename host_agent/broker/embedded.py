"""The embedded broker: STOMP 1.2 in the host agent's own process, on its reactor, without threads."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, DeferredList, maybeDeferred
from twisted.internet.endpoints import TCP4ServerEndpoint, TCP6ServerEndpoint
from twisted.internet.interfaces import IAddress, IListeningPort, IProtocolFactory
from twisted.internet.protocol import Factory
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from host_agent import __version__
from host_agent.broker.connection import BrokerConnection
from host_agent.broker.destinations import Destinations
from host_agent.broker.frames import KnownHeads
from host_agent.broker.limits import BrokerLimits
from host_agent.broker.principals import Principal
from host_agent.broker.queues import MessageQueue
from host_agent.broker.statistics import BrokerStatistics, Totals

_EXPIRY_SECONDS = 2.0
_LISTEN_BACKLOG = 256


def _nothing() -> None:
    pass


class BrokerFactory(Factory):
    """Makes the broker's connections, for `endpoint.listen` and `reactor.adoptStreamConnection`."""

    noisy = False

    def __init__(self, broker: EmbeddedBroker, only_principal: str | None) -> None:
        self._broker = broker
        self._only_principal = only_principal

    def buildProtocol(self, address: IAddress | None) -> BrokerConnection:
        """A connection for one client."""
        connection = BrokerConnection(self._broker, self._only_principal)
        connection.factory = self
        return connection


class EmbeddedBroker:
    """A STOMP broker for the queues and topics of one host; nothing is kept on disk.

    `authenticate(login, passcode)` gives the client's principal, or None to refuse it; it must not block.
    """

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        *,
        authenticate: Callable[[str, str], Principal | None],
        limits: BrokerLimits | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.reactor = reactor
        self.authenticate = authenticate
        self.limits = limits if limits is not None else BrokerLimits()
        self.server_name = f"vmwrapper/{__version__}"
        self.epoch = secrets.token_hex(4)
        """Tells this broker's message ids from those of another run."""
        self.destinations = Destinations(self.limits, wall_clock, self.room_made)
        self.known_heads = KnownHeads()
        self.factory: IProtocolFactory = BrokerFactory(self, None)
        self._connections: set[BrokerConnection] = set()
        self._sessions = 0
        self._turns: deque[BrokerConnection] = deque()
        self._afterwards: list[Callable[[], None]] = []
        self._at_work = False
        self._held_back: dict[BrokerConnection, None] = {}
        self._held_back_ever = 0
        self._retry_planned = False
        self._ports: list[IListeningPort] = []
        self._stopped: Deferred[None] | None = None
        self._expiry = LoopingCall(self._look_at_time)
        self._expiry.clock = reactor

    @property
    def totals(self) -> Totals:
        """The counters that connections add to."""
        return self.destinations.totals

    def factory_for(self, principal_name: str | None) -> IProtocolFactory:
        """A factory whose connections may log in as this principal only; with None, as any."""
        return BrokerFactory(self, principal_name)

    def listen(self, host: str, port: int) -> Deferred[IListeningPort]:
        """Listen on an address; port 0 takes a free one. The result is also stopped by `stop()`."""
        endpoint_class = TCP6ServerEndpoint if ":" in host else TCP4ServerEndpoint
        endpoint: Any = endpoint_class(self.reactor, port, backlog=_LISTEN_BACKLOG, interface=host)

        def keep(opened: IListeningPort) -> IListeningPort:
            self._ports.append(opened)
            return opened

        listening: Deferred[IListeningPort] = endpoint.listen(self.factory)
        return listening.addCallback(keep)

    def stop(self) -> Deferred[None]:
        """Stop listening, send what is written, close every connection; messages in queues are lost."""
        if self._stopped is not None:
            return self._stopped
        stopped: Deferred[None] = Deferred()
        self._stopped = stopped
        if self._expiry.running:
            self._expiry.stop()
        ports = DeferredList([maybeDeferred(port.stopListening) for port in self._ports])
        self._ports.clear()
        for connection in list(self._connections):
            connection.close("The broker is being stopped.")
        if self.totals.messages:
            self.log.warn("stopping with {count} messages not delivered", count=self.totals.messages)
        ports.addCallback(lambda _: self._finish_stop())
        return stopped

    def statistics(self) -> BrokerStatistics:
        """The broker's state now; the cost grows with the number of destinations, not of messages."""
        totals = self.totals
        destinations = tuple(self.destinations.statistics())
        return BrokerStatistics(
            connections=len(self._connections),
            consumers=sum(destination.consumers for destination in destinations),
            messages=totals.messages,
            bytes=totals.bytes,
            enqueued=totals.enqueued,
            dequeued=totals.dequeued,
            dropped=totals.dropped,
            expired=totals.expired,
            dead_lettered=totals.dead_lettered,
            bytes_received=totals.bytes_received,
            bytes_sent=totals.bytes_sent,
            senders_held_back=self._held_back_ever,
            destinations=destinations,
        )

    # Called by connections

    def connection_made(self, connection: BrokerConnection) -> str:
        """Take a connection in; returns the sentence with which to refuse it, or nothing."""
        self._connections.add(connection)
        if self._stopped is not None:
            return "The broker is being stopped."
        if len(self._connections) > self.limits.connections:
            return f"The broker has {self.limits.connections} connections, and that is its limit."
        if not self._expiry.running:
            self._expiry.start(_EXPIRY_SECONDS, now=False)
        return ""

    def connection_lost(self, connection: BrokerConnection) -> None:
        """Forget a connection."""
        self._connections.discard(connection)
        self._held_back.pop(connection, None)
        if not self._connections:
            self._finish_stop()

    def next_session(self) -> str:
        """An id for a client's session."""
        self._sessions += 1
        return f"{self.epoch}-{self._sessions}"

    def wants_turn(self, connection: BrokerConnection) -> None:
        """A connection has more input than one turn may handle."""
        self._turns.append(connection)
        if len(self._turns) == 1:
            self.reactor.callLater(0, self._take_turns)

    def soon(self, call: Callable[[], None]) -> None:
        """Call it when the frames that are being handled are handled, or in the reactor's next turn."""
        self._afterwards.append(call)
        if not self._at_work and len(self._afterwards) == 1:
            self.reactor.callLater(0, self.work, _nothing)

    def work(self, work: Callable[[], object]) -> None:
        """Do this, and then what it leads to: give to the sockets and to the host agent what was written to them."""
        self._at_work = True
        try:
            work()
        finally:
            self._do_afterwards()
            self._at_work = False

    def _do_afterwards(self) -> None:
        while self._afterwards:
            calls, self._afterwards = self._afterwards, []
            for call in calls:
                try:
                    call()
                except Exception:
                    self.log.failure("a client of the broker failed")

    def hold_back(self, connection: BrokerConnection) -> None:
        """A connection waits for room in a queue."""
        self._held_back[connection] = None
        self._held_back_ever += 1
        if connection.held_queue is not None:
            # Debug only: a sender faster than its consumer waits for every message.
            self.log.debug("a sender waits for room in {queue}", queue=connection.held_queue.name)

    def room_made(self) -> None:
        """A message has left the store."""
        if self._held_back and not self._retry_planned:
            self._retry_planned = True
            self.reactor.callLater(0, self._retry_held_back)

    # Helpers

    def _look_at_time(self) -> None:
        self.destinations.expire()
        now = self.reactor.seconds()
        for connection in list(self._connections):
            connection.look_at_unfinished_frame(now)

    def _take_turns(self) -> None:
        """One turn for each connection that wants one; the reactor serves everybody else in between."""
        self.work(self._one_turn_each)
        if self._turns:
            self.reactor.callLater(0, self._take_turns)

    def _one_turn_each(self) -> None:
        turns = self._turns
        for _ in range(len(turns)):
            connection = turns[0]
            again = connection.take_turn()
            # It stays in the deque during its turn, so that wants_turn() plans no second round.
            turns.popleft()
            if again:
                turns.append(connection)

    def _retry_held_back(self) -> None:
        self._retry_planned = False
        still_full: set[MessageQueue] = set()
        for connection in list(self._held_back):
            queue = connection.held_queue
            if queue in still_full:
                continue
            if connection.retry_held():
                self._held_back.pop(connection, None)
            elif queue is not None:
                # Later senders to this queue stay behind this one, even with smaller messages.
                still_full.add(queue)

    def _finish_stop(self) -> None:
        stopped = self._stopped
        if stopped is not None and not stopped.called and not self._connections:
            stopped.callback(None)
