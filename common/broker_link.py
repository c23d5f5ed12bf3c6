"""The way to the broker: stomp.py bridged to the reactor.

stomp.py is a blocking library, so everything that may block happens in two threads of each connection: stomp.py's
own receiver and our sender, which also connects, waits and connects again. The reactor only ever puts into a
bounded queue (a full queue drops: the link above sends again) and is called back with `callFromThread`.

    reactor ──send()──▶ bounded queue ──sender thread──▶ socket
    reactor ◀─callFromThread── bounded number ◀── stomp.py's receiver thread ◀── socket

Back-pressure: a broker that does not read stops the sender, then the queue fills, then the link's window
(`link.py`) does, and the producer pauses. A reactor that is behind stops the receiver, and TCP the broker.
"""

from __future__ import annotations

import enum
import logging
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol, Union

import attrs
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from .stomp_connection import HELD_UP, StompConnection
from .tls import Tls

FIRST_WAIT, WAIT_FACTOR, MOST_WAIT, JITTER = 1.0, 1.5, 60.0, 0.2  # seconds between attempts
STABLE = 5.0  # a connection that lasted so many seconds begins the waits anew
QUEUE_MESSAGES, QUEUE_BYTES = 10_000, 16 * 1024 * 1024
INBOX_MESSAGES, INBOX_BYTES = 512, 8 * 1024 * 1024  # received, not yet taken by the reactor
STOP_SECONDS = 5.0  # for what is queued to go out at the end
DRAIN_SECONDS = 10.0

# stomp.py logs what our own events already tell, with tracebacks; only its debug log would add something.
logging.getLogger("stomp.py").setLevel(logging.CRITICAL)


@attrs.frozen
class BrokerAddress:
    """One broker of a fail-over list; without `tls` the connection is not encrypted."""

    host: str
    port: int
    tls: Tls | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@attrs.frozen
class Credentials:
    """What a broker asks for. The passcode never shows in logs."""

    login: str
    passcode: str = attrs.field(repr=False)


class Dialect(enum.Enum):
    """How a broker names our destinations (`docs/broker.md` says why they differ)."""

    STOMP = "stomp"  # as they are: the embedded broker, ActiveMQ
    RABBITMQ = "rabbitmq"  # an exchange to send to and a queue to read, both declared beforehand

    def to_send(self, destination: str) -> str:
        if self is Dialect.STOMP:
            return destination
        return f"/exchange/{destination.split('/', 2)[2]}"

    def to_subscribe(self, destination: str, login: str) -> str:
        if self is Dialect.STOMP:
            return destination
        _, kind, name = destination.split("/", 2)
        # Each reader of a topic has a queue of its own, bound to the topic's exchange.
        return f"/amq/queue/{name}.{login}" if kind == "topic" else f"/amq/queue/{name}"


class BrokerEvents(Protocol):
    """Who is told what happens on a connection; all calls are made in the reactor's thread."""

    def broker_connected(self) -> None: ...

    def broker_disconnected(self, reason: str) -> None: ...

    def broker_message(self, destination: str, body: bytes) -> None: ...


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


@attrs.frozen
class _Send:
    destination: str
    body: bytes


@attrs.frozen
class _Subscribe:
    destination: str
    number: int


@attrs.frozen
class _Unsubscribe:
    number: int


_Item = Union[_Send, _Subscribe, _Unsubscribe]  # not |: guests have Python 3.9


class _Outbox:
    """A queue between threads, bounded in messages and bytes, that can be woken."""

    def __init__(self) -> None:
        self._ready = threading.Condition()
        self._items: deque[_Item] = deque()
        self._bytes = 0
        self._woken = False

    def put(self, item: _Item) -> bool:
        """Never waits; False when there is no room."""
        size = len(item.body) if isinstance(item, _Send) else 0
        with self._ready:
            if len(self._items) >= QUEUE_MESSAGES or self._bytes + size > QUEUE_BYTES:
                return False
            self._items.append(item)
            self._bytes += size
            self._ready.notify()
            return True

    def get(self) -> _Item | None:
        """The next item; None when woken and empty."""
        with self._ready:
            while not self._items and not self._woken:
                self._ready.wait()
            self._woken = False
            if not self._items:
                return None
            item = self._items.popleft()
            self._bytes -= len(item.body) if isinstance(item, _Send) else 0
            return item

    def wake(self) -> None:
        with self._ready:
            self._woken = True
            self._ready.notify()

    def clear(self) -> None:
        with self._ready:
            self._items.clear()
            self._bytes = 0

    def __len__(self) -> int:
        with self._ready:
            return len(self._items)


class _Inbox:
    """Counts what the receiver has handed over and the reactor has not taken."""

    def __init__(self) -> None:
        self._room = threading.Condition()
        self._messages = self._bytes = 0

    def enter(self, size: int, ended: threading.Event) -> None:
        """Wait for room, unless the connection ends meanwhile."""
        with self._room:
            while (self._messages >= INBOX_MESSAGES or self._bytes > INBOX_BYTES) and not ended.is_set():
                self._room.wait(0.5)
            self._messages += 1
            self._bytes += size

    def leave(self, size: int) -> None:
        with self._room:
            self._messages -= 1
            self._bytes -= size
            self._room.notify()


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
        self._outbox = _Outbox()
        self._inbox = _Inbox()
        self._stopping = threading.Event()
        self._hurry = threading.Event()  # the wait between two connections is over
        self._connection: StompConnection | None = None
        self._thread: threading.Thread | None = None
        self._stopped: Deferred[None] | None = None
        self._stop_timer: Any = None
        self.connected = False
        self.address: BrokerAddress | None = None  # the broker we are connected to, or were last
        self.dropped = 0  # messages that found the queue full

    def start(self) -> None:
        """Begin to connect; returns at once."""
        self._thread = threading.Thread(target=self._run, name="broker-sender", daemon=True)
        self._thread.start()

    def send(self, destination: str, body: bytes) -> bool:
        """Queue a message. False when there is no connection or no room: it is lost, and the link above sends again."""
        if not self.connected:
            return False
        if not self._outbox.put(_Send(destination, body)):
            self.dropped += 1
            return False
        return True

    def drain(self, destination: str) -> Deferred[bool]:
        """Empty a queue that nobody else reads or writes any more. True when it is empty for certain."""
        done: Deferred[bool] = Deferred()
        self._last_subscription += 1
        number = self._last_subscription
        mark = f"mark {secrets.token_hex(16)}".encode()
        drain = _Drain(mark, done)
        if not (
            self.connected
            and self._outbox.put(_Send(destination, mark))
            and self._outbox.put(_Subscribe(destination, number))
        ):
            done.callback(False)
            return done
        self._drains[number] = drain
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
                self._outbox.wake()
        return self._stopped

    def _abort(self) -> None:
        """The broker does not take what is queued: end the connection under the sender's feet."""
        connection = self._connection
        if connection is not None:
            connection.abort()
        # A connection that is only being made cannot be ended; its thread is of no matter to us then.
        self._stop_timer = self._reactor.callLater(1.0, self._on_stopped)

    # -- everything below runs in the sender's thread

    def _run(self) -> None:
        backoff, turn = Backoff(), 0
        try:
            while not self._stopping.is_set():
                address = self._brokers[turn % len(self._brokers)]
                connection = self._connection = StompConnection(address, self._credentials, self._receive, self._lost)
                reason = connection.open(self._stopping) or self._subscribe_all(connection)
                if reason:
                    turn += 1
                    pause = turn % len(self._brokers) == 0  # after a round, not between the brokers of one
                else:
                    self._call(self._on_connected, address)
                    began = time.monotonic()
                    self._pump(connection)
                    reason = connection.reason or "stopped"
                    pause = True  # the same broker first: it may only have been restarted
                    if time.monotonic() - began > STABLE:
                        backoff.reset()
                connection.close()
                if self._stopping.is_set():
                    break
                self._call(self._on_lost, f"the broker at {address} {reason}")
                if pause:
                    self._hurry.wait(backoff.next())
                self._hurry.clear()
        finally:
            self._connection = None
            self._call(self._on_stopped)

    def _subscribe_all(self, connection: StompConnection) -> str:
        """Subscribe to everything; returns "" or why not."""
        try:
            for number, destination in self._subscriptions.items():
                connection.subscribe(self._dialect.to_subscribe(destination, self._credentials.login), number)
        except Exception:
            connection.fail("broke the connection")
        return connection.reason

    def _pump(self, connection: StompConnection) -> None:
        while not connection.lost.is_set():
            item = self._outbox.get()
            if item is None:
                if self._stopping.is_set():
                    return
                continue  # woken because the connection was lost
            try:
                self._put(connection, item)
            except BlockingIOError:
                connection.fail(HELD_UP)
                return
            except Exception as error:
                connection.fail(f"broke the connection ({type(error).__name__})")
                return
            if self._stopping.is_set() and not len(self._outbox):
                return

    def _put(self, connection: StompConnection, item: _Item) -> None:
        if isinstance(item, _Send):
            connection.send(self._dialect.to_send(item.destination), item.body)
        elif isinstance(item, _Subscribe):
            destination = self._dialect.to_subscribe(item.destination, self._credentials.login)
            connection.subscribe(destination, item.number)
        else:
            connection.unsubscribe(item.number)

    def _call(self, function: Any, *args: Any) -> None:
        try:
            self._reactor.callFromThread(function, *args)
        except RuntimeError:  # the reactor is gone; nobody listens any more
            pass

    # -- in stomp.py's receiver thread

    def _receive(self, connection: StompConnection, number: int, body: bytes) -> None:
        self._inbox.enter(len(body), connection.lost)
        self._call(self._on_message, number, body)

    def _lost(self) -> None:
        self._outbox.wake()

    # -- and these in the reactor's

    def _on_connected(self, address: BrokerAddress) -> None:
        self.connected = True
        self.address = address
        self._log.info("connected to the broker at {address}", address=address)
        self._events.broker_connected()

    def _on_message(self, number: int, body: bytes) -> None:
        self._inbox.leave(len(body))
        if self._stopped is not None:
            return
        drain = self._drains.get(number)
        if drain is not None:
            if body == drain.mark:
                self._end_drain(number, True)
        elif number in self._subscriptions:
            self._events.broker_message(self._subscriptions[number], body)

    def _end_drain(self, number: int, empty: bool) -> None:
        drain = self._drains.pop(number)
        if drain.timer is not None and drain.timer.active():
            drain.timer.cancel()
        self._outbox.put(_Unsubscribe(number))
        drain.done.callback(empty)

    def _on_lost(self, reason: str) -> None:
        self.connected = False
        self._outbox.clear()  # what was queued for the lost connection would only arrive late and twice
        for number in list(self._drains):
            self._end_drain(number, False)
        self._outbox.clear()
        self._log.warn("no connection: {reason}", reason=reason)
        self._events.broker_disconnected(reason)

    def _on_stopped(self) -> None:
        self.connected = False
        if self._stop_timer is not None and self._stop_timer.active():
            self._stop_timer.cancel()
        if self._stopped is None:
            self._stopped = Deferred()
        if not self._stopped.called:
            self._stopped.callback(None)
