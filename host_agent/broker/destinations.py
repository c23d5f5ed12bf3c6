"""The broker's queues and topics by name: made on first use, removed when empty and unused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import attrs

from common.errors import ProtocolError
from host_agent.broker.frames import Frame, header_lines
from host_agent.broker.limits import BrokerLimits
from host_agent.broker.queues import Consumer, Message, MessageQueue
from host_agent.broker.statistics import DestinationStatistics, Totals

_DESTINATION = re.compile(r"/(queue|topic)/[A-Za-z0-9._:@+-]{1,200}")
_TOPIC_PREFIX = "/topic/"

_OWN_HEADERS = frozenset(
    (
        "ack",
        "content-length",
        "destination",
        "login",
        "message-id",
        "passcode",
        "receipt",
        "redelivered",
        "redelivery-count",
        "subscription",
        "transaction",
    )
)
"""Headers of a SEND that are the broker's own in a MESSAGE, or nobody else's business."""


class Refusal(ProtocolError):
    """A frame that the broker does not carry out; the sentence goes into the ERROR frame."""


@attrs.define
class Topic:
    """The present subscribers of a topic, each with a backlog of its own."""

    name: str
    backlogs: dict[Consumer, MessageQueue] = attrs.field(factory=dict)
    enqueued: int = 0
    left: list[int] = attrs.field(factory=lambda: [0, 0, 0])
    """Dequeued, dropped and expired by subscribers who have left."""


class Destinations:
    """Every queue and topic of one broker, and the messages' numbers."""

    def __init__(self, limits: BrokerLimits, clock: Callable[[], float], on_room: Callable[[], None]) -> None:
        """`clock` is wall-clock time in seconds, because `expires` headers are."""
        self.totals = Totals()
        self._limits = limits
        self._clock = clock
        self._on_room = on_room
        self._queues: dict[str, MessageQueue] = {}
        self._topics: dict[str, Topic] = {}
        self._last_number = 0

    def message(self, frame: Frame) -> Message:
        """The message that a SEND frame holds; raises Refusal when its `expires` is not usable."""
        headers = frame.headers
        longest = self._limits.message_seconds
        expires = self._clock() + longest if longest else 0.0
        if "expires" in headers:
            try:
                asked = int(headers["expires"]) / 1000
            except (ValueError, OverflowError):
                raise Refusal("The header expires is not a number of milliseconds since 1970.") from None
            if asked:
                expires = min(asked, expires) if expires else asked
        known = frame.head
        head = known.message if known is not None else b""
        if not head:
            head = _message_head(frame)
            if known is not None and known.length >= 0:
                known.message = head
        self._last_number += 1
        return Message(self._last_number, head, frame.pieces or (frame.body,), expires)

    def queue(self, name: str) -> MessageQueue:
        """The queue of this destination, made if needed; raises Refusal."""
        queue = self._queues.get(name)
        if queue is None:
            self._check_new(name)
            queue = self._queues[name] = self._make_queue(name)
        return queue

    def publish(self, name: str, message: Message) -> None:
        """Give a message to everyone who is subscribed to the topic now."""
        topic = self._topics.get(name)
        if topic is None:
            check_destination(name)
            return
        topic.enqueued += 1
        for backlog in list(topic.backlogs.values()):
            backlog.put(message)

    def subscribe(self, name: str, consumer: Consumer) -> MessageQueue:
        """The queue from which this consumer takes: the destination's, or its own backlog of a topic."""
        if not name.startswith(_TOPIC_PREFIX):
            return self.queue(name)
        topic = self._topics.get(name)
        if topic is None:
            self._check_new(name)
            topic = self._topics[name] = Topic(name)
        limits = self._limits
        backlog = self._new_queue(name, limits.topic_backlog_messages, limits.topic_backlog_bytes, True, True)
        topic.backlogs[consumer] = backlog
        return backlog

    def unsubscribe(self, queue: MessageQueue, consumer: Consumer) -> None:
        """End a subscription; a topic's backlog goes, a queue's messages stay."""
        queue.remove(consumer)
        topic = self._topics.get(queue.name)
        if topic is None:
            self.remove_if_unused(queue)
            return
        topic.backlogs.pop(consumer, None)
        queue.clear()
        for place, count in enumerate((queue.dequeued, queue.dropped, queue.expired)):
            topic.left[place] += count
        if not topic.backlogs:
            del self._topics[topic.name]

    def remove_if_unused(self, queue: MessageQueue) -> None:
        """Forget a queue that holds nothing and that nobody uses."""
        if queue.is_unused:
            self._queues.pop(queue.name, None)

    def refuse(self, queue: MessageQueue, message: Message) -> bool:
        """Count a refused delivery; True if the message has gone to the dead letters."""
        message.refusals += 1
        message.deliveries += 1
        if message.refusals < self._limits.refusals or queue.name == self._limits.dead_letter_queue:
            return False
        queue.discard(message)
        self.totals.dead_lettered += 1
        name = self._limits.dead_letter_queue
        dead_letters = self._queues.get(name)
        if dead_letters is None:
            dead_letters = self._queues[name] = self._make_queue(name)
        head = (
            f"destination:{dead_letters.name}\noriginal-destination:{queue.name}\n"
            f"dead-letter-reason:refused {message.refusals} times\n"
        )
        # The old destination header stays behind ours: of repeated headers the first counts.
        dead_letters.put(Message(message.number, head.encode() + message.head, message.body))
        return True

    def expire(self) -> None:
        """Drop expired messages everywhere."""
        for queue in list(self._queues.values()):
            queue.expire()
            self.remove_if_unused(queue)
        for topic in self._topics.values():
            for backlog in topic.backlogs.values():
                backlog.expire()

    def statistics(self) -> Iterator[DestinationStatistics]:
        """One value for each queue and topic."""
        for queue in self._queues.values():
            yield DestinationStatistics(
                destination=queue.name,
                consumers=len(queue.consumers),
                messages=queue.depth,
                bytes=queue.bytes,
                enqueued=queue.enqueued,
                dequeued=queue.dequeued,
                dropped=queue.dropped,
                expired=queue.expired,
            )
        for topic in self._topics.values():
            backlogs = topic.backlogs.values()
            dequeued, dropped, expired = topic.left
            yield DestinationStatistics(
                destination=topic.name,
                consumers=len(backlogs),
                messages=sum(backlog.depth for backlog in backlogs),
                bytes=sum(backlog.bytes for backlog in backlogs),
                enqueued=topic.enqueued,
                dequeued=dequeued + sum(backlog.dequeued for backlog in backlogs),
                dropped=dropped + sum(backlog.dropped for backlog in backlogs),
                expired=expired + sum(backlog.expired for backlog in backlogs),
            )

    def _check_new(self, name: str) -> None:
        check_destination(name)
        if len(self._queues) + len(self._topics) >= self._limits.destinations:
            raise Refusal(f"The broker has {self._limits.destinations} destinations, and that is its limit.")

    def _make_queue(self, name: str) -> MessageQueue:
        limits = self._limits
        if name == limits.dead_letter_queue:
            return self._new_queue(name, limits.dead_letter_messages, limits.dead_letter_bytes, True)
        if limits.mailbox_prefix and name.startswith(limits.mailbox_prefix):
            return self._new_queue(name, limits.mailbox_messages, limits.mailbox_bytes, True)
        return self._new_queue(name, limits.queue_messages, limits.queue_bytes, False)

    def _new_queue(
        self, name: str, messages: int, size: int, drops_oldest: bool, delivers_once: bool = False
    ) -> MessageQueue:
        return MessageQueue(
            name,
            most_messages=messages,
            most_bytes=size,
            most_stored_bytes=self._limits.stored_bytes,
            totals=self.totals,
            clock=self._clock,
            on_room=self._on_room,
            drops_oldest=drops_oldest,
            delivers_once=delivers_once,
        )


def _message_head(frame: Frame) -> bytes:
    """What a MESSAGE says of a SEND frame besides what differs from delivery to delivery."""
    headers = frame.headers
    if frame.head is not None and frame.head.plain:
        lines = "".join([f"{name}:{value}\n" for name, value in headers.items() if name not in _OWN_HEADERS])
    else:
        lines = header_lines({name: headers[name] for name in headers if name not in _OWN_HEADERS})
    return f"destination:{headers['destination']}\n{lines}content-length:{frame.length}\n\n".encode()


def check_destination(name: str) -> None:
    """Raise Refusal unless this is `/queue/NAME` or `/topic/NAME`."""
    if not _DESTINATION.fullmatch(name):
        raise Refusal(
            f"The destination {name[:100]!r} is not /queue/NAME or /topic/NAME, "
            "with a name of at most 200 letters, digits and the characters . _ : @ + -"
        )


def required(headers: Mapping[str, str], name: str) -> str:
    """A header's value; raises Refusal when it is missing."""
    try:
        return headers[name]
    except KeyError:
        raise Refusal(f"The frame has no {name} header.") from None
