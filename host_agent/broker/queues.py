"""Messages waiting in order, and the consumers in line for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from host_agent.broker.frames import Pieces
from host_agent.broker.statistics import Totals

MESSAGE_OVERHEAD_BYTES = 256
"""Counted for each stored message besides its bytes, so that empty messages are not free."""


class Message:
    """One message as it is stored: already encoded, but for what differs from delivery to delivery."""

    __slots__ = ("body", "deliveries", "expires", "head", "length", "number", "refusals", "size")

    def __init__(self, number: int, head: bytes, body: Pieces, expires: float = 0.0) -> None:
        self.number = number
        """Grows with every message of a broker: the order of a queue."""
        self.head = head
        """The MESSAGE frame's bytes from the destination header to the blank line."""
        self.body = body
        self.length = len(head) + sum(map(len, body)) + 1
        """Of the frame's bytes that are the same in each delivery, with the closing NUL."""
        self.size = self.length + MESSAGE_OVERHEAD_BYTES
        self.expires = expires
        """Seconds since the epoch; 0 for never."""
        self.deliveries = 0
        """Deliveries that ended without an acknowledgement."""
        self.refusals = 0


class Consumer(Protocol):
    """One who takes messages from a queue."""

    in_line: bool
    """Kept by the queue: whether this consumer stands in its line."""

    def can_take(self) -> bool:
        """Whether a message may be delivered now."""

    def deliver(self, message: Message) -> None:
        """Send the message; settle it at once, or keep it until it is acknowledged."""


class MessageQueue:
    """A first-in first-out store with a depth limit and a fair round-robin line of consumers.

    Depth counts the stored messages and those delivered but not settled.
    With `drops_oldest` a full queue makes room itself (topic backlogs, dead letters);
    otherwise the sender asks `has_room()` first and waits.
    """

    __slots__ = (
        "_clock",
        "_line",
        "_messages",
        "_most_bytes",
        "_most_messages",
        "_most_stored_bytes",
        "_next_expiry",
        "_totals",
        "bytes",
        "consumers",
        "delivers_once",
        "depth",
        "dequeued",
        "dropped",
        "drops_oldest",
        "enqueued",
        "expired",
        "name",
        "on_room",
        "senders_waiting",
    )

    def __init__(
        self,
        name: str,
        *,
        most_messages: int,
        most_bytes: int,
        most_stored_bytes: int,
        totals: Totals,
        clock: Callable[[], float],
        on_room: Callable[[], None],
        drops_oldest: bool = False,
        delivers_once: bool = False,
    ) -> None:
        self.name = name
        self.drops_oldest = drops_oldest
        self.delivers_once = delivers_once
        """A message is settled when it is delivered, whatever the consumer's mode: a topic's backlog."""
        self.on_room = on_room
        """Called whenever a message has left; it must not call back into the queue."""
        self.senders_waiting = 0
        self.consumers: set[Consumer] = set()
        self.depth = 0
        self.bytes = 0
        self.enqueued = 0
        self.dequeued = 0
        self.dropped = 0
        self.expired = 0
        self._messages: deque[Message] = deque()
        self._line: deque[Consumer] = deque()
        self._most_messages = most_messages
        self._most_bytes = most_bytes
        self._most_stored_bytes = most_stored_bytes
        self._totals = totals
        self._clock = clock
        self._next_expiry = 0.0

    @property
    def is_unused(self) -> bool:
        """Nothing would be lost by removing the queue."""
        return not self.depth and not self.consumers and not self.senders_waiting

    @property
    def has_waiting(self) -> bool:
        """Whether messages wait for a consumer."""
        return bool(self._messages)

    def has_room(self, size: int) -> bool:
        """Whether a message of this size may be put; an empty queue takes any one message."""
        if self.depth and (self.depth >= self._most_messages or self.bytes + size > self._most_bytes):
            return False
        return self._totals.bytes + size <= self._most_stored_bytes

    def put(self, message: Message) -> None:
        """Store a message at the end, or deliver it at once."""
        totals = self._totals
        self.enqueued += 1
        totals.enqueued += 1
        if message.expires:
            if message.expires <= self._clock():
                self.expired += 1
                totals.expired += 1
                return
            if not self._next_expiry or message.expires < self._next_expiry:
                self._next_expiry = message.expires
        self.depth += 1
        self.bytes += message.size
        totals.messages += 1
        totals.bytes += message.size
        self._messages.append(message)
        if self._line:
            self.dispatch()
        if self.drops_oldest and self._messages:
            self._drop_overflow()

    def dispatch(self) -> None:
        """Deliver while there are messages and consumers able to take them."""
        messages = self._messages
        line = self._line
        while messages and line:
            consumer = line[0]
            if not consumer.can_take():
                consumer.in_line = False
                line.popleft()
                continue
            message = messages.popleft()
            if message.expires and message.expires <= self._clock():
                self._count_expired(message)
                continue
            line.rotate(-1)
            consumer.deliver(message)

    def settle(self, message: Message) -> None:
        """The message has been consumed."""
        self.dequeued += 1
        self._totals.dequeued += 1
        self._forget(message)

    def discard(self, message: Message) -> None:
        """The message leaves without having been consumed."""
        self.dropped += 1
        self._totals.dropped += 1
        self._forget(message)

    def give_back(self, returned: list[Message]) -> None:
        """Put delivered messages back at the front, in their old order; the caller dispatches."""
        if not returned:
            return
        messages = self._messages
        last = max(message.number for message in returned)
        while messages and messages[0].number < last:
            returned.append(messages.popleft())
        returned.sort(key=_by_number)
        messages.extendleft(reversed(returned))
        for message in returned:
            if message.expires and (not self._next_expiry or message.expires < self._next_expiry):
                self._next_expiry = message.expires

    def add(self, consumer: Consumer) -> None:
        """Let a consumer take part."""
        self.consumers.add(consumer)
        self.wake(consumer)

    def remove(self, consumer: Consumer) -> None:
        """End a consumer's part; what it holds is its own affair, see `give_back()`."""
        self.consumers.discard(consumer)
        if consumer.in_line:
            consumer.in_line = False
            self._line.remove(consumer)

    def wake(self, consumer: Consumer) -> None:
        """A consumer may be able to take messages again."""
        if not consumer.in_line:
            consumer.in_line = True
            self._line.append(consumer)
        if self._messages:
            self.dispatch()

    def expire(self) -> None:
        """Drop what has expired; costs nothing until the earliest expiry has passed."""
        now = self._clock()
        if not self._next_expiry or self._next_expiry > now:
            return
        kept: list[Message] = []
        for message in self._messages:
            if message.expires and message.expires <= now:
                self._count_expired(message)
            else:
                kept.append(message)
        self._messages = deque(kept)
        self._next_expiry = min((message.expires for message in kept if message.expires), default=0.0)

    def clear(self) -> None:
        """Drop what waits, as when a topic's subscriber leaves."""
        while self._messages:
            self._forget(self._messages.popleft())

    def _drop_overflow(self) -> None:
        messages = self._messages
        while len(messages) > 1 and (
            self.depth > self._most_messages
            or self.bytes > self._most_bytes
            or self._totals.bytes > self._most_stored_bytes
        ):
            self.discard(messages.popleft())

    def _count_expired(self, message: Message) -> None:
        self.expired += 1
        self._totals.expired += 1
        self._forget(message)

    def _forget(self, message: Message) -> None:
        self.depth -= 1
        self.bytes -= message.size
        totals = self._totals
        totals.messages -= 1
        totals.bytes -= message.size
        self.on_room()


def _by_number(message: Message) -> int:
    return message.number
