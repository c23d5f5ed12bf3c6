"""The host agent's own way into the embedded broker, which lives in the same process: no socket, no thread, no frames.

It stands where `common.broker_link.BrokerLink` does for other brokers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twisted.internet.defer import Deferred, succeed

from common.broker_address import BrokerEvents

from .destinations import Refusal
from .embedded import EmbeddedBroker
from .frames import Frame
from .queues import Message, MessageQueue


class LocalLink:
    """Sends to the broker's queues and takes from them, as a client that is always connected and always reads."""

    def __init__(self, reactor: Any, broker: EmbeddedBroker, subscriptions: Sequence[str], events: BrokerEvents):
        self._reactor = reactor
        self._broker = broker
        self._destinations = broker.destinations
        self._subscriptions = list(subscriptions)
        self._events = events
        self._consumers: list[_LocalConsumer] = []
        self.connected = False

    def start(self) -> None:
        """Subscribe; `broker_connected` follows."""
        self.connected = True
        for destination in self._subscriptions:
            consumer = _LocalConsumer(self._broker, destination, self._events)
            consumer.queue = self._destinations.subscribe(destination, consumer)
            consumer.queue.add(consumer)
            self._consumers.append(consumer)
        self._reactor.callLater(0, self._events.broker_connected)

    def send(self, destination: str, body: bytes) -> bool:
        """Put a message into a queue. False: there is no room, and it is lost; the link above sends again."""
        if not self.connected:
            return False
        try:
            message = self._destinations.message(Frame("SEND", {"destination": destination}, body))
            queue = self._destinations.queue(destination)
        except Refusal:
            return False  # the broker has all the queues that it may have
        if not queue.drops_oldest and not queue.has_room(message.size):
            return False
        queue.put(message)
        return True

    def stop(self) -> Deferred[None]:
        """Take nothing more. What was sent is in its queue already."""
        self.connected = False
        consumers, self._consumers = self._consumers, []
        for consumer in consumers:
            self._destinations.unsubscribe(consumer.queue, consumer)
        return succeed(None)


class _LocalConsumer:
    """Takes a queue's messages; hands them on when the broker's work is done, so that a sender is never called back."""

    queue: MessageQueue

    def __init__(self, broker: EmbeddedBroker, destination: str, events: BrokerEvents) -> None:
        self.in_line = False
        self._broker = broker
        self._destination = destination
        self._events = events
        self._bodies: list[bytes] = []

    def can_take(self) -> bool:
        return True

    def deliver(self, message: Message) -> None:
        self._bodies.append(b"".join(message.body))
        self.queue.settle(message)
        if len(self._bodies) == 1:
            self._broker.soon(self._hand_on)

    def _hand_on(self) -> None:
        bodies, self._bodies = self._bodies, []
        for body in bodies:
            self._events.broker_message(self._destination, body)
