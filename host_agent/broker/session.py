"""What one logged-in client has asked for, and what each of its frames does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from twisted.logger import Logger

from host_agent.broker.destinations import Refusal, required
from host_agent.broker.frames import Frame
from host_agent.broker.principals import Principal
from host_agent.broker.subscriptions import AckMode, Subscription

if TYPE_CHECKING:
    from host_agent.broker.connection import BrokerConnection
    from host_agent.broker.embedded import EmbeddedBroker
    from host_agent.broker.queues import Message

_REMEMBERED_DESTINATIONS = 1_000
_MOST_DIGITS = 9


class Session:
    """From CONNECTED to the end of the connection: the client's rights and its subscriptions."""

    log = Logger()

    __slots__ = (
        "_broker",
        "_by_index",
        "_connection",
        "_last_index",
        "_send_allowed",
        "_subscriptions",
        "_version",
        "principal",
    )

    def __init__(
        self, broker: EmbeddedBroker, connection: BrokerConnection, principal: Principal, version: str
    ) -> None:
        self.principal = principal
        self._broker = broker
        self._connection = connection
        self._version = version
        self._send_allowed: set[str] = set()
        self._subscriptions: dict[str, Subscription] = {}
        self._by_index: dict[str, Subscription] = {}
        self._last_index = 0

    def handle(self, frame: Frame) -> None:
        """Carry out one frame; raises Refusal."""
        handler = _HANDLERS.get(frame.command)
        if handler is None:
            raise Refusal(f"This broker knows no {frame.command[:32]!r} frame.")
        handler(self, frame)

    def wake_subscriptions(self) -> None:
        """The client reads again: continue until it does not."""
        for subscription in list(self._subscriptions.values()):
            subscription.queue.wake(subscription)
            if self._connection.outlet.paused:
                return

    def end(self) -> None:
        """Give back what the client holds, and end its subscriptions."""
        subscriptions = list(self._subscriptions.values())
        self._subscriptions.clear()
        self._by_index.clear()
        for subscription in subscriptions:
            self._end_subscription(subscription)

    def _send(self, frame: Frame) -> None:
        headers = frame.headers
        destination = required(headers, "destination")
        if destination not in self._send_allowed:
            self._check_may_send(destination)
        if "transaction" in headers:
            self._refuse_transaction(frame)
        destinations = self._broker.destinations
        message = destinations.message(frame)
        if destination.startswith("/topic/"):
            destinations.publish(destination, message)
        else:
            queue = destinations.queue(destination)
            if not queue.drops_oldest and (queue.senders_waiting or not queue.has_room(message.size)):
                self._connection.hold(queue, message, frame)
                return
            queue.put(message)
        if "receipt" in headers:
            self._connection.answer_receipt(frame)

    def _subscribe(self, frame: Frame) -> None:
        headers = frame.headers
        destination = required(headers, "destination")
        name = required(headers, "id")
        if name in self._subscriptions:
            raise Refusal(f"This connection has a subscription {name[:100]!r} already.")
        most = self._broker.limits.subscriptions_per_connection
        if len(self._subscriptions) >= most:
            raise Refusal(f"A connection has at most {most} subscriptions.")
        if not self.principal.may_subscribe(destination):
            raise self._not_allowed("subscribe to", destination)
        if "selector" in headers:
            raise Refusal("This broker has no selectors.")
        try:
            mode = AckMode(headers.get("ack", "auto"))
        except ValueError:
            raise Refusal("The header ack is none of auto, client and client-individual.") from None
        prefetch = self._prefetch(headers)
        self._last_index += 1
        index = self._last_index
        subscription = Subscription(
            self._connection.outlet, name, index, mode, prefetch, self._broker.epoch, self._version
        )
        queue = self._broker.destinations.subscribe(destination, subscription)
        subscription.queue = queue
        self._subscriptions[name] = subscription
        self._by_index[str(index)] = subscription
        # The receipt goes first: what follows it belongs to the subscription.
        self._connection.answer_receipt(frame)
        queue.add(subscription)

    def _prefetch(self, headers: dict[str, str]) -> int:
        limits = self._broker.limits
        text = headers.get("prefetch-count") or headers.get("activemq.prefetchSize") or "0"
        if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS):
            raise Refusal("The prefetch is not a number.")
        return min(int(text) or limits.prefetch, limits.prefetch_most)

    def _unsubscribe(self, frame: Frame) -> None:
        name = required(frame.headers, "id")
        subscription = self._subscriptions.pop(name, None)
        if subscription is None:
            raise Refusal(f"This connection has no subscription {name[:100]!r}.")
        del self._by_index[subscription.index]
        self._end_subscription(subscription)
        self._connection.answer_receipt(frame)

    def _ack(self, frame: Frame) -> None:
        subscription, messages = self._acknowledged(frame)
        if subscription is not None:
            queue = subscription.queue
            if not queue.delivers_once:
                for message in messages:
                    queue.settle(message)
            if queue.has_waiting:
                queue.wake(subscription)
        if "receipt" in frame.headers:
            self._connection.answer_receipt(frame)

    def _nack(self, frame: Frame) -> None:
        subscription, messages = self._acknowledged(frame)
        if subscription is not None:
            queue = subscription.queue
            if not queue.delivers_once:
                refuse = self._broker.destinations.refuse
                queue.give_back([message for message in messages if not refuse(queue, message)])
            queue.wake(subscription)
        self._connection.answer_receipt(frame)

    def _acknowledged(self, frame: Frame) -> tuple[Subscription | None, list[Message]]:
        headers = frame.headers
        if "transaction" in headers:
            self._refuse_transaction(frame)
        ack = required(headers, "id" if self._version == "1.2" else "message-id")
        index, _, _ = ack.partition("-")
        subscription = self._by_index.get(index)
        if subscription is None:
            if self._was_given(index):
                # After UNSUBSCRIBE its messages are back in the queue, and a late ACK is no mistake.
                return None, []
            raise Refusal(f"The {frame.command} names a message {ack[:100]!r} that was not delivered here.")
        messages = subscription.take_acknowledged(ack)
        if not messages:
            raise Refusal(f"The {frame.command} names a message {ack[:100]!r} that is not waiting for it.")
        return subscription, messages

    def _was_given(self, index: str) -> bool:
        digits = index.isascii() and index.isdigit() and len(index) <= _MOST_DIGITS
        return digits and 0 < int(index) <= self._last_index

    def _refuse_transaction(self, frame: Frame) -> None:
        raise Refusal("This broker has no transactions.")

    def _disconnect(self, frame: Frame) -> None:
        self._connection.answer_receipt(frame)
        self._connection.close()

    def _check_may_send(self, destination: str) -> None:
        if not self.principal.may_send(destination):
            raise self._not_allowed("send to", destination)
        if len(self._send_allowed) < _REMEMBERED_DESTINATIONS:
            self._send_allowed.add(destination)

    def _not_allowed(self, action: str, destination: str) -> Refusal:
        return Refusal(f"The login {self.principal.name!r} may not {action} {destination[:250]!r}.")

    def _end_subscription(self, subscription: Subscription) -> None:
        queue = subscription.queue
        queue.remove(subscription)
        if not queue.delivers_once:
            messages = subscription.take_all()
            for message in messages:
                message.deliveries += 1
            queue.give_back(messages)
            queue.dispatch()
        self._broker.destinations.unsubscribe(queue, subscription)


_HANDLERS: dict[str, Callable[[Session, Frame], None]] = {
    "SEND": Session._send,
    "ACK": Session._ack,
    "NACK": Session._nack,
    "SUBSCRIBE": Session._subscribe,
    "UNSUBSCRIBE": Session._unsubscribe,
    "DISCONNECT": Session._disconnect,
    "BEGIN": Session._refuse_transaction,
    "COMMIT": Session._refuse_transaction,
    "ABORT": Session._refuse_transaction,
}
