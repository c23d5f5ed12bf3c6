"""One subscription: what it may hold without acknowledging, and what it holds."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from host_agent.broker.frames import escape
from host_agent.broker.queues import Message, MessageQueue

if TYPE_CHECKING:
    from host_agent.broker.outlet import Outlet


_PLACE = Message(0, b"", ())


class AckMode(enum.Enum):
    """The `ack` header of SUBSCRIBE."""

    AUTO = "auto"
    CLIENT = "client"
    CLIENT_INDIVIDUAL = "client-individual"


class Subscription:
    """Takes messages from a queue, or from its own backlog of a topic, for one connection."""

    __slots__ = (
        "_ack_prefix",
        "_asks",
        "_delivered",
        "_frame_start",
        "_id_is_ack",
        "_outlet",
        "in_line",
        "index",
        "mode",
        "name",
        "prefetch",
        "queue",
        "unacknowledged",
    )

    queue: MessageQueue
    """Set right after the subscription is made, because a topic's backlog belongs to its consumer."""

    def __init__(
        self,
        outlet: Outlet,
        name: str,
        index: int,
        mode: AckMode,
        prefetch: int,
        epoch: str,
        version: str,
    ) -> None:
        self.name = name
        self.index = str(index)
        self.mode = mode
        self.prefetch = prefetch
        self.in_line = False
        self.unacknowledged: dict[str, Message] = {}
        """By the id that an ACK names, in order of delivery."""
        self._outlet = outlet
        self._asks = mode is not AckMode.AUTO
        self._delivered = 0
        self._ack_prefix = f"{index}-"
        # STOMP 1.1 acknowledges by message-id, so there each delivery has its own.
        self._id_is_ack = version == "1.1" and mode is not AckMode.AUTO
        start = f"MESSAGE\nsubscription:{escape(name)}\nmessage-id:"
        self._frame_start = start if self._id_is_ack else f"{start}{epoch}-"

    def can_take(self) -> bool:
        """Whether the client reads, and holds fewer messages than its prefetch."""
        return not self._outlet.paused and (not self._asks or len(self.unacknowledged) < self.prefetch)

    def deliver(self, message: Message) -> None:
        """Send the message to the client."""
        if not self._asks:
            head = f"{self._frame_start}{message.number}\n"
        else:
            self._delivered += 1
            ack = f"{self._ack_prefix}{self._delivered}"
            # A topic's message is not delivered again, so only its place in the prefetch is kept.
            self.unacknowledged[ack] = _PLACE if self.queue.delivers_once else message
            if self._id_is_ack:
                head = f"{self._frame_start}{ack}\n"
            else:
                head = f"{self._frame_start}{message.number}\nack:{ack}\n"
        if message.deliveries:
            head += f"redelivered:true\nredelivery-count:{message.deliveries}\n"
        self._outlet.message(head.encode(), message)
        if not self._asks or self.queue.delivers_once:
            self.queue.settle(message)

    def take_acknowledged(self, ack: str) -> list[Message]:
        """The messages that an ACK or NACK of this id is about; empty when the id is not known."""
        held = self.unacknowledged
        if ack not in held:
            return []
        if self.mode is AckMode.CLIENT_INDIVIDUAL:
            return [held.pop(ack)]
        acknowledged = []
        for known in held:
            acknowledged.append(known)
            if known == ack:
                break
        return [held.pop(known) for known in acknowledged]

    def take_all(self) -> list[Message]:
        """Everything that is held, when the subscription ends."""
        messages = list(self.unacknowledged.values())
        self.unacknowledged.clear()
        return messages
