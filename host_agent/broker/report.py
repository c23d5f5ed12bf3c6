"""What a broker says of itself, in one form for every kind of broker. None: this broker cannot tell."""

from __future__ import annotations

from typing import Any

import attrs

from .statistics import BrokerStatistics

MOST_QUEUES = 1000  # in one report, the deepest first


@attrs.frozen
class QueueReport:
    """One queue or topic."""

    name: str
    messages: int | None = None
    bytes: int | None = None
    consumers: int | None = None
    enqueued: int | None = None
    dequeued: int | None = None
    dropped: int | None = None
    expired: int | None = None


@attrs.frozen
class BrokerReport:
    """A broker now. Counters (`enqueued` and the like) grow from the broker's start on."""

    kind: str  # embedded, activemq, rabbitmq
    name: str  # where it is
    problem: str = ""  # why there is no report, and what to do
    version: str = ""
    connections: int | None = None
    consumers: int | None = None
    messages: int | None = None
    bytes: int | None = None
    memory_bytes: int | None = None
    memory_limit_bytes: int | None = None
    enqueued: int | None = None
    dequeued: int | None = None
    dropped: int | None = None
    expired: int | None = None
    dead_letters: int | None = None
    bytes_received: int | None = None
    bytes_sent: int | None = None
    queues: tuple[QueueReport, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As `docs/control.md` has it."""
        return attrs.asdict(self)

    @property
    def unknown(self) -> list[str]:
        """What this broker cannot tell."""
        return [field.name for field in attrs.fields(type(self)) if getattr(self, field.name) is None]


def deepest(queues: list[QueueReport]) -> tuple[QueueReport, ...]:
    """At most so many as a report holds."""
    ordered = sorted(queues, key=lambda queue: (-(queue.messages or 0), queue.name))
    return tuple(ordered[:MOST_QUEUES])


def of_embedded(statistics: BrokerStatistics, limit_bytes: int, version: str) -> BrokerReport:
    """The embedded broker's numbers; its memory is what its messages take, as it is part of the host agent."""
    return BrokerReport(
        kind="embedded",
        name="in the host agent",
        version=version,
        connections=statistics.connections,
        consumers=statistics.consumers,
        messages=statistics.messages,
        bytes=statistics.bytes,
        memory_bytes=statistics.bytes,
        memory_limit_bytes=limit_bytes,
        enqueued=statistics.enqueued,
        dequeued=statistics.dequeued,
        dropped=statistics.dropped,
        expired=statistics.expired,
        dead_letters=statistics.dead_lettered,
        bytes_received=statistics.bytes_received,
        bytes_sent=statistics.bytes_sent,
        queues=deepest(
            [
                QueueReport(
                    name=each.destination,
                    messages=each.messages,
                    bytes=each.bytes,
                    consumers=each.consumers,
                    enqueued=each.enqueued,
                    dequeued=each.dequeued,
                    dropped=each.dropped,
                    expired=each.expired,
                )
                for each in statistics.destinations
            ]
        ),
    )
