"""The way to the broker: stomp.py bridged to the reactor.

stomp.py is a blocking library, so everything that may block happens in two threads of each connection: stomp.py's
own receiver and our sender, which also connects, waits and connects again. The reactor only ever puts into a
bounded queue (a full queue drops: the link above sends again) and is called back with `callFromThread`.

    reactor ──send()──▶ bounded queue ──sender thread──▶ socket
    reactor ◀─callFromThread── stomp.py's receiver thread ◀── socket
"""

from __future__ import annotations

import logging
import queue
import random
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

import attrs
import stomp.connect
import stomp.listener
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFromThreads
from twisted.logger import Logger

HEARTBEAT_MS = 10_000
CONNECT_TIMEOUT = 20.0  # seconds for TCP and for the broker's CONNECTED
FIRST_WAIT, WAIT_FACTOR, MOST_WAIT = 1.0, 1.5, 60.0  # seconds between attempts; ±20 % jitter
QUEUE_MESSAGES = 10_000

# stomp.py logs what our own events already tell, with tracebacks; only its debug log would add something.
logging.getLogger("stomp.py").setLevel(logging.CRITICAL)


@attrs.frozen
class BrokerAddress:
    """One broker of a fail-over list."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@attrs.frozen
class Credentials:
    """What a broker asks for. The passcode never shows in logs."""

    login: str
    passcode: str = attrs.field(repr=False)


class BrokerEvents(Protocol):
    """Who is told what happens on a connection; all calls are made in the reactor's thread."""

    def broker_connected(self) -> None: ...

    def broker_disconnected(self, reason: str) -> None: ...

    def broker_message(self, destination: str, body: bytes) -> None: ...


@attrs.frozen
class _Send:
    destination: str
    body: bytes


_STOP = object()


class BrokerLink:
    """A connection to the first broker of a list that answers, kept up until `stop`.

    `subscriptions` are made anew on every connection, before `broker_connected`.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: IReactorFromThreads,
        brokers: Sequence[BrokerAddress],
        credentials: Credentials,
        subscriptions: Sequence[str],
        events: BrokerEvents,
    ) -> None:
        self._reactor = reactor
        self._brokers = list(brokers)
        self._credentials = credentials
        self._subscriptions = list(subscriptions)
        self._events = events
        self._queue: queue.Queue[Any] = queue.Queue(QUEUE_MESSAGES)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._stopped: Deferred[None] | None = None
        self.connected = False
        self.dropped = 0  # messages that found the queue full

    def start(self) -> None:
        """Begin to connect; returns at once."""
        self._thread = threading.Thread(target=self._run, name="broker-sender", daemon=True)
        self._thread.start()

    def send(self, destination: str, body: bytes) -> None:
        """Queue a message. It is lost when there is no connection or no room: the link above knows."""
        if not self.connected:
            return
        try:
            self._queue.put_nowait(_Send(destination, body))
        except queue.Full:
            self.dropped += 1

    def stop(self) -> Deferred[None]:
        """Send what is queued, disconnect by receipt (bounded in time), and end the threads."""
        if self._stopped is None:
            self._stopped = Deferred()
            self._stopping.set()
            if self._thread is None:
                self._stopped.callback(None)
            else:
                try:
                    self._queue.put_nowait(_STOP)
                except queue.Full:
                    pass  # the sender looks at the flag after every message
        return self._stopped

    # -- everything below runs in the sender's thread

    def _run(self) -> None:
        wait, turn = FIRST_WAIT, 0
        try:
            while not self._stopping.is_set():
                address = self._brokers[turn % len(self._brokers)]
                turn += 1
                connection = _Connection(self, address)
                reason = connection.open()
                if not reason:
                    wait, turn = FIRST_WAIT, turn - 1  # the same broker first, next time
                    self._pump(connection)
                    reason = connection.reason or "stopped"
                connection.close()
                if self._stopping.is_set():
                    break
                self._call(self._on_lost, f"{address}: {reason}")
                if reason and turn % len(self._brokers) == 0:
                    self._stopping.wait(wait * random.uniform(0.8, 1.2))  # noqa: S311  (jitter)
                    wait = min(wait * WAIT_FACTOR, MOST_WAIT)
        finally:
            self._call(self._on_stopped)

    def _pump(self, connection: _Connection) -> None:
        while not connection.lost.is_set():
            item = self._queue.get()
            if item is _STOP or item is None:
                if self._stopping.is_set():
                    return
                continue  # woken because the connection was lost
            try:
                connection.send(item)
            except Exception as error:
                connection.fail(f"sending failed: {error!r}")
                return
            if self._stopping.is_set() and self._queue.empty():
                return

    def _call(self, function: Any, *args: Any) -> None:
        try:
            self._reactor.callFromThread(function, *args)
        except RuntimeError:  # the reactor is gone; nobody listens any more
            pass

    # -- and these in the reactor's

    def _on_connected(self, address: BrokerAddress) -> None:
        self.connected = True
        self._log.info("connected to the broker at {address}", address=address)
        self._events.broker_connected()

    def _on_message(self, destination: str, body: bytes) -> None:
        if self._stopped is None:
            self._events.broker_message(destination, body)

    def _on_lost(self, reason: str) -> None:
        self.connected = False
        while True:  # what was queued for the lost connection would only arrive late and twice
            try:
                self._queue.get_nowait()
            except queue.Empty:
                break
        self._log.warn("no connection to the broker {reason}", reason=reason)
        self._events.broker_disconnected(reason)

    def _on_stopped(self) -> None:
        self.connected = False
        if self._stopped is None:
            self._stopped = Deferred()
        if not self._stopped.called:
            self._stopped.callback(None)


class _Connection(stomp.listener.ConnectionListener):  # type: ignore[misc]
    """One stomp.py connection. stomp.py calls the `on_…` methods in its receiver's thread."""

    def __init__(self, owner: BrokerLink, address: BrokerAddress) -> None:
        self._owner = owner
        self._address = address
        self._answered = threading.Event()
        self.lost = threading.Event()
        self.reason = ""
        self._stomp = stomp.connect.StompConnection12(
            [(address.host, address.port)],
            prefer_localhost=False,
            try_loopback_connect=False,
            reconnect_attempts_max=1,
            timeout=CONNECT_TIMEOUT,
            heartbeats=(HEARTBEAT_MS, HEARTBEAT_MS),
            auto_decode=False,
        )
        self._stomp.set_listener("link", self)

    def open(self) -> str:
        """Connect and subscribe. Returns "" or why it could not."""
        credentials = self._owner._credentials
        try:
            self._stomp.connect(credentials.login, credentials.passcode, with_connect_command=True)
        except Exception as error:
            return self.reason or f"cannot be reached ({type(error).__name__})"
        deadline = time.monotonic() + CONNECT_TIMEOUT
        while not self._answered.wait(0.5):
            if self._owner._stopping.is_set() or time.monotonic() > deadline:
                return f"accepted the connection but did not answer within {CONNECT_TIMEOUT:.0f} s"
        if self.lost.is_set():
            return self.reason
        for number, destination in enumerate(self._owner._subscriptions):
            self._stomp.subscribe(destination, id=str(number), ack="auto")
        self._owner._call(self._owner._on_connected, self._address)
        return ""

    def send(self, item: _Send) -> None:
        self._stomp.send(item.destination, item.body, content_type="application/octet-stream")

    def fail(self, reason: str) -> None:
        """The connection is of no use any more; wakes whoever waits for it."""
        self.reason = self.reason or reason
        self.lost.set()
        self._answered.set()
        try:
            self._owner._queue.put_nowait(None)
        except queue.Full:
            pass

    def close(self) -> None:
        """Disconnect: by receipt when the connection is in order, within a second at most."""
        self._stomp.remove_listener("link")
        if not self.lost.is_set():
            done = threading.Event()
            self._stomp.set_listener("farewell", _Farewell(done))
            try:
                self._stomp.disconnect("farewell")
                done.wait(1.0)
            except Exception:
                pass
        try:
            self._stomp.transport.disconnect_socket()
        except Exception:
            pass

    # -- called by stomp.py

    def on_connecting(self, host_and_port: tuple[str, int]) -> None:
        # Without this, Nagle's algorithm and delayed ACKs cost 40 ms for every small exchange.
        connected = self._stomp.transport.socket
        if connected is not None and connected.family in (socket.AF_INET, socket.AF_INET6):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def on_connected(self, frame: Any) -> None:
        self._answered.set()

    def on_message(self, frame: Any) -> None:
        body = frame.body if isinstance(frame.body, bytes) else str(frame.body or "").encode()
        self._owner._call(self._owner._on_message, frame.headers.get("destination", ""), body)

    def on_error(self, frame: Any) -> None:
        self.fail(f"says: {frame.headers.get('message', 'ERROR')}")

    def on_heartbeat_timeout(self) -> None:
        self.fail("fell silent (no heart-beat)")

    def on_disconnected(self) -> None:
        self.fail("closed the connection")


class _Farewell(stomp.listener.ConnectionListener):  # type: ignore[misc]
    def __init__(self, done: threading.Event) -> None:
        self._done = done

    def on_receipt(self, frame: Any) -> None:
        self._done.set()

    def on_disconnected(self) -> None:
        self._done.set()
