"""What the broker can tell about itself."""

from __future__ import annotations

import attrs


@attrs.frozen
class DestinationStatistics:
    """One queue or topic; depths count what is stored and what is delivered but not acknowledged."""

    destination: str
    consumers: int
    messages: int
    bytes: int
    enqueued: int
    dequeued: int
    dropped: int
    expired: int


@attrs.frozen
class BrokerStatistics:
    """The whole broker since its start; counters never go back, also when a destination is removed."""

    connections: int
    consumers: int
    messages: int
    bytes: int
    enqueued: int
    dequeued: int
    dropped: int
    expired: int
    dead_lettered: int
    bytes_received: int
    bytes_sent: int
    senders_held_back: int
    destinations: tuple[DestinationStatistics, ...]


class Totals:
    """The counters behind BrokerStatistics, changed in place because every message touches them."""

    __slots__ = (
        "bytes",
        "bytes_received",
        "bytes_sent",
        "dead_lettered",
        "dequeued",
        "dropped",
        "enqueued",
        "expired",
        "messages",
    )

    def __init__(self) -> None:
        self.messages = 0
        self.bytes = 0
        self.enqueued = 0
        self.dequeued = 0
        self.dropped = 0
        self.expired = 0
        self.dead_lettered = 0
        self.bytes_received = 0
        self.bytes_sent = 0
