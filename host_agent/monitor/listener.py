"""Hears the presence and status topics of one broker, in a thread of its own, and keeps what comes until it is taken.

The page's reactor and the terminal's thread both take it now and then, so neither is ever called back. Whoever floods a
topic loses its own oldest words, not our memory.
"""

from __future__ import annotations

import threading
import time
from collections import deque

import attrs

from common import messages
from common.broker_address import Dialect
from common.broker_link import STABLE, Backoff
from common.stomp_connection import StompConnection
from host_agent.broker.watch import WatchSettings

MOST_WAITING = 5000  # messages that wait to be taken
MOST_BYTES = 8 * 1024 * 1024
STOP_SECONDS = 5.0
TOPICS = (messages.PRESENCE, messages.STATUS)


@attrs.frozen
class Heard:
    """What has come since somebody last took it."""

    messages: list[tuple[str, bytes]]  # topic, body
    lost: int  # messages for which there was no room
    connected: bool
    connections: int  # so far
    problem: str  # why there is no connection, while there is none


class Listener:
    """`take` from any one thread."""

    def __init__(self, settings: WatchSettings) -> None:
        self.settings = settings
        self.name = str(settings.broker)
        self._lock = threading.Lock()
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._bytes = 0
        self._lost = 0
        self._connections = 0
        self._connected = False
        self._problem = ""
        self._stopping = threading.Event()
        self._connection: StompConnection | None = None
        self._thread = threading.Thread(target=self._run, name=f"listener {self.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Does not wait for a broker that hangs."""
        self._stopping.set()
        connection = self._connection
        if connection is not None:
            connection.fail("is not listened to any more")
            connection.abort()

    def join(self) -> None:
        self._thread.join(STOP_SECONDS)

    def take(self) -> Heard:
        """Everything that has come."""
        with self._lock:
            waiting, lost = list(self._waiting), self._lost
            self._waiting.clear()
            self._bytes = self._lost = 0
            return Heard(waiting, lost, self._connected, self._connections, self._problem)

    # -- in our thread

    def _run(self) -> None:
        backoff = Backoff()
        while not self._stopping.is_set():
            settings = self.settings
            connection = StompConnection(settings.broker, settings.credentials, self._receive, lambda: None)
            self._connection = connection
            reason = connection.open(self._stopping) or self._subscribe(connection)
            if not reason:
                with self._lock:
                    self._connected, self._problem = True, ""
                    self._connections += 1
                began = time.monotonic()
                connection.lost.wait()
                reason = connection.reason
                if time.monotonic() - began > STABLE:
                    backoff.reset()
            with self._lock:
                self._connected, self._problem = False, reason
            connection.close()
            self._connection = None
            self._stopping.wait(backoff.next())

    def _subscribe(self, connection: StompConnection) -> str:
        rabbitmq = self.settings.dialect is Dialect.RABBITMQ
        try:
            for number, topic in enumerate(TOPICS):
                # RabbitMQ makes a queue for as long as we are there: of one that was made before, two take turns.
                connection.subscribe(self.settings.dialect.to_send(topic) if rabbitmq else topic, number)
        except Exception as error:
            connection.fail(f"broke the connection ({type(error).__name__})")
        return connection.reason

    # -- in stomp.py's thread

    def _receive(self, connection: StompConnection, number: int, body: bytes) -> None:
        if number >= len(TOPICS):
            return
        with self._lock:
            self._waiting.append((TOPICS[number], body))
            self._bytes += len(body)
            while self._waiting and (len(self._waiting) > MOST_WAITING or self._bytes > MOST_BYTES):
                self._bytes -= len(self._waiting.popleft()[1])
                self._lost += 1
