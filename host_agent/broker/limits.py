"""The broker's limits: every dimension in which a client could make it grow or wait."""

from __future__ import annotations

import attrs

KIB = 1024
MIB = 1024 * KIB


@attrs.frozen
class FrameLimits:
    """What one frame may be; a frame over a limit ends its connection with an ERROR frame."""

    command_bytes: int = 32
    header_count: int = 64
    header_line_bytes: int = 4 * KIB
    header_bytes: int = 16 * KIB
    body_bytes: int = 4 * MIB


@attrs.frozen
class BrokerLimits:
    """What all clients together, one client, and one destination may use; times in seconds."""

    frames: FrameLimits = attrs.field(factory=FrameLimits)
    connections: int = 2_000
    subscriptions_per_connection: int = 100
    destinations: int = 10_000
    stored_bytes: int = 256 * MIB
    """All queues and topic backlogs together, a topic's message counted once for each subscriber it waits for."""

    queue_messages: int = 10_000
    queue_bytes: int = 64 * MIB
    message_seconds: float = 0.0
    """How long a message may wait, 0 for as long as it takes; its own `expires` can only shorten that."""

    mailbox_prefix: str = ""
    """Queues that begin so drop their oldest message when they are full, and nobody who sends to them ever waits:
    for readers that may be dead, and senders that send again. "" for none."""

    mailbox_messages: int = 10_000
    mailbox_bytes: int = 8 * MIB
    topic_backlog_messages: int = 1_000
    topic_backlog_bytes: int = 8 * MIB
    dead_letter_queue: str = "/queue/dead-letter"
    dead_letter_messages: int = 1_000
    dead_letter_bytes: int = 8 * MIB
    refusals: int = 5
    """How often one message may be refused (NACK) before it goes to the dead-letter queue."""

    prefetch: int = 100
    prefetch_most: int = 1_000
    login_seconds: float = 10.0
    frame_seconds: float = 30.0
    """How long a frame may take from its first byte to its last, while the broker reads."""

    full_queue_seconds: float = 10.0
    """How long a sender is held back by a full queue before its connection ends with an ERROR frame."""

    closing_seconds: float = 2.0
    """How long a closing connection may take to read what was written to it."""

    heart_beat_seconds: float = 0.2
    """The shortest heart-beat interval agreed to, either way."""

    heart_beat_grace: float = 2.0
    """A client is given up after this many of its agreed intervals in silence."""

    answer_bytes: int = 64 * KIB
    """Receipts written to a client that does not read them, before the broker stops reading from it."""

    frames_per_turn: int = 16
    """Frames of one connection handled before the others get their turn."""

    bytes_per_turn: int = 256 * KIB
    turn_seconds: float = 0.000_3
    """A turn ends at the first of these three; the time counts where one frame reaches many subscribers."""
