"""The way to the broker: connections of stomp.py that live in the reactor (`reactor_connection.py`).

Connecting may block, so a thread does it, waits between two attempts, and sleeps while a connection is in order.
The reactor never waits: what a broker does not take is kept up to a bound, and what is beyond it is dropped (the link
above sends again). So a broker that does not read fills that first, then the link's window (`link.py`), and the
producer pauses; a reactor that is behind does not read, and TCP stops the broker.
"""

from __future__ import annotations

import logging
import random
import secrets
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

import attrs
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from .broker_address import BrokerAddress, BrokerEvents, Credentials, Dialect
from .reactor_connection import ReactorConnection
from .stomp_connection import StompConnection

FIRST_WAIT, WAIT_FACTOR, MOST_WAIT, JITTER = 1.0, 1.5, 60.0, 0.2  # seconds between attempts
STABLE = 5.0  # a connection that lasted so many seconds begins the waits anew
QUEUE_BYTES = 16 * 1024 * 1024  # that the broker has not taken
STOP_SECONDS = 5.0  # for what is queued to go out at the end
DRAIN_SECONDS = 10.0

# stomp.py logs what our own events already tell, with tracebacks; only its debug log would add something.
logging.getLogger("stomp.py").setLevel(logging.CRITICAL)


class ReactorThreads(Protocol):
    """What we need of a reactor."""

    def callFromThread(self, function: Any, /, *args: Any) -> Any: ...

    def callLater(self, delay: float, function: Any, /, *args: Any) -> Any: ...


class Backoff:
    """The waits between attempts: 1 s, each 1.5 times the one before, at most 60 s, ±20 %."""

    def __init__(self) -> None:
        self._wait = FIRST_WAIT

    def reset(self) -> None:
        self._wait = FIRST_WAIT

    def next(self) -> float:
        wait = self._wait * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311  (jitter)
        self._wait = min(self._wait * WAIT_FACTOR, MOST_WAIT)
        return wait


@attrs.define
class _Drain:
    """A queue that is being emptied: everything is dropped until our own mark comes."""

    mark: bytes
    done: Deferred[bool]
    timer: Any = None


class BrokerLink:
    """A connection to the first broker of a list that answers, kept up until `stop`.

    `subscriptions` are made anew on every connection, before `broker_connected`.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: ReactorThreads,
        brokers: Sequence[BrokerAddress],
        credentials: Credentials,
        subscriptions: Sequence[str],
        events: BrokerEvents,
        dialect: Dialect = Dialect.STOMP,
    ) -> None:
        self._reactor = reactor
        self._brokers = list(brokers)
        self._credentials = credentials
        self._subscriptions = dict(enumerate(subscriptions))
        self._last_subscription = len(self._subscriptions)
        self._drains: dict[int, _Drain] = {}
        self._events = events
        self._dialect = dialect
        self._stopping = threading.Event()
        self._hurry = threading.Event()  # the wait between two connections is over
        self._connection: ReactorConnection | None = None
        self._thread: threading.Thread | None = None
        self._stopped: Deferred[None] | None = None
        self._stop_timer: Any = None
        self.connected = False
        self.address: BrokerAddress | None = None  # the broker we are connected to, or were last
        self.dropped = 0  # messages for which there was no room

    def start(self) -> None:
        """Begin to connect; returns at once."""
        self._thread = threading.Thread(target=self._run, name="broker-connector", daemon=True)
        self._thread.start()

    def send(self, destination: str, body: bytes) -> bool:
        """Send a message. False when there is no connection or no room: it is lost, and the link above sends again."""
        connection = self._connection
        if not self.connected or connection is None:
            return False
        if connection.backlog + len(body) > QUEUE_BYTES:
            self.dropped += 1
            return False
        connection.send(self._dialect.to_send(destination), body)
        return True

    def drain(self, destination: str) -> Deferred[bool]:
        """Empty a queue that nobody else reads or writes any more. True when it is empty for certain."""
        done: Deferred[bool] = Deferred()
        self._last_subscription += 1
        number = self._last_subscription
        mark = f"mark {secrets.token_hex(16)}".encode()
        drain = _Drain(mark, done)
        if not self.send(destination, mark) or self._connection is None:
            done.callback(False)
            return done
        self._drains[number] = drain
        self._connection.subscribe(self._dialect.to_subscribe(destination, self._credentials.login), number)
        drain.timer = self._reactor.callLater(DRAIN_SECONDS, self._end_drain, number, False)
        return done

    def hurry(self) -> None:
        """End the wait between two connections, now or when it begins."""
        self._hurry.set()

    def reconnect(self, reason: str) -> None:
        """What leads nowhere any more is given up, and a new connection is made at once."""
        self.hurry()
        connection = self._connection
        if connection is not None and self.connected:
            connection.fail(reason)
            connection.abort()

    def stop(self) -> Deferred[None]:
        """Send what is queued, disconnect by receipt (bounded in time), and end the threads."""
        if self._stopped is None:
            self._stopped = Deferred()
            self._stopping.set()
            self._hurry.set()
            for number in list(self._drains):
                self._end_drain(number, False)
            if self._thread is None:
                self._stopped.callback(None)
            else:
                self._stop_timer = self._reactor.callLater(STOP_SECONDS if self.connected else 0, self._abort)
                if self._connection is not None and self.connected:
                    self._connection.farewell()
        return self._stopped

    def _abort(self) -> None:
        """The broker does not take what it was sent, or does not answer: end the connection as it is."""
        connection = self._connection
        if connection is not None:
            connection.fail("was left")
            connection.abort()
        # A connection that is only being made cannot be ended; its thread is of no matter to us then.
        self._stop_timer = self._reactor.callLater(1.0, self._on_stopped)

    # -- in the thread that connects

    def _run(self) -> None:
        backoff, turn = Backoff(), 0
        try:
            while not self._stopping.is_set():
                address = self._brokers[turn % len(self._brokers)]
                connection = ReactorConnection(self._reactor, address, self._credentials, self._receive)
                self._connection = connection
                reason = connection.open(self._stopping)
                if reason:
                    connection.close()
                    turn += 1
                    pause = turn % len(self._brokers) == 0  # after a round, not between the brokers of one
                else:
                    self._call(self._on_connected, address, connection)
                    began = time.monotonic()
                    connection.lost.wait()
                    reason = connection.reason
                    pause = True  # the same broker first: it may only have been restarted
                    if time.monotonic() - began > STABLE:
                        backoff.reset()
                self._call(self._on_lost, connection, f"the broker at {address} {reason}")
                if pause and not self._stopping.is_set():
                    self._hurry.wait(backoff.next())
                self._hurry.clear()
        finally:
            self._call(self._on_stopped)

    def _call(self, function: Any, *args: Any) -> None:
        try:
            self._reactor.callFromThread(function, *args)
        except RuntimeError:  # the reactor is gone; nobody listens any more
            pass

    # -- and these in the reactor's

    def _on_connected(self, address: BrokerAddress, connection: ReactorConnection) -> None:
        connection.begin()
        if self._stopping.is_set():
            connection.fail("is not needed any more")
            return
        for number, destination in self._subscriptions.items():
            connection.subscribe(self._dialect.to_subscribe(destination, self._credentials.login), number)
        self.connected = True
        self.address = address
        self._log.info("connected to the broker at {address}", address=address)
        self._events.broker_connected()

    def _receive(self, connection: StompConnection, number: int, body: bytes) -> None:
        if self._stopped is not None:
            return
        drain = self._drains.get(number)
        if drain is not None:
            if body == drain.mark:
                self._end_drain(number, True)
        elif number in self._subscriptions:
            try:
                self._events.broker_message(self._subscriptions[number], body)
            except Exception:
                self._log.failure("a message could not be handled")

    def _end_drain(self, number: int, empty: bool) -> None:
        drain = self._drains.pop(number)
        if drain.timer is not None and drain.timer.active():
            drain.timer.cancel()
        if self._connection is not None and self.connected:
            self._connection.unsubscribe(number)
        drain.done.callback(empty)

    def _on_lost(self, connection: ReactorConnection, reason: str) -> None:
        connection.detach()
        self.connected = False
        if self._stopping.is_set():
            return
        for number in list(self._drains):
            self._end_drain(number, False)
        self._log.warn("no connection: {reason}", reason=reason)
        self._events.broker_disconnected(reason)

    def _on_stopped(self) -> None:
        self.connected = False
        if self._connection is not None:
            self._connection.detach()
        if self._stop_timer is not None and self._stop_timer.active():
            self._stop_timer.cancel()
        if self._stopped is None:
            self._stopped = Deferred()
        if not self._stopped.called:
            self._stopped.callback(None)
