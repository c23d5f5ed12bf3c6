"""Heart-beats of one connection, both ways."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall, IReactorTime

from host_agent.broker.destinations import Refusal


class HeartBeats:
    """Sends an end-of-line when nothing else was sent, and notices when nothing comes in.

    The owner sets `received_at` on every read.
    """

    __slots__ = ("_give_up", "_incoming", "_is_silent", "_patience", "_reactor", "_send", "_timers", "received_at")

    def __init__(
        self,
        reactor: IReactorTime,
        *,
        outgoing: float,
        incoming: float,
        patience: float,
        is_silent: Callable[[], bool],
        send: Callable[[], None],
        give_up: Callable[[], None],
    ) -> None:
        """`outgoing` and `incoming` are the agreed intervals in seconds, 0 for none.

        `is_silent`: whether nothing was sent since it was asked last.
        """
        self._is_silent = is_silent
        self.received_at = reactor.seconds()
        self._reactor = reactor
        self._send = send
        self._give_up = give_up
        self._incoming = incoming
        self._patience = incoming * patience
        self._timers: dict[str, IDelayedCall] = {}
        if outgoing:
            self._beat(outgoing / 2)
        if incoming:
            self._later("listen", self._patience, self._listen, False)

    def stop(self) -> None:
        """Cancel the timers."""
        for timer in self._timers.values():
            if timer.active():
                timer.cancel()
        self._timers.clear()

    def reprieve(self) -> None:
        """Begin to listen anew, after `give_up` found that the silence was not the client's."""
        self.received_at = self._reactor.seconds()
        self._later("listen", self._patience, self._listen, False)

    def _beat(self, half: float) -> None:
        # Looking twice in each interval keeps every silence shorter than the interval.
        if self._is_silent():
            self._send()
        self._later("beat", half, self._beat, half)

    def _listen(self, was_late: bool) -> None:
        left = self.received_at + self._patience - self._reactor.seconds()
        if left > 0:
            self._later("listen", left, self._listen, False)
        elif was_late:
            self._give_up()
        else:
            # Timers run before sockets are read: after this whole machine slept, the client's bytes
            # may be waiting unread, so it gets a moment more.
            self._later("listen", min(self._incoming / 2, 0.5), self._listen, True)

    def _later(self, name: str, delay: float, call: Callable[..., None], argument: object) -> None:
        self._timers[name] = self._reactor.callLater(delay, call, argument)


def agreed_intervals(header: str, shortest: float) -> tuple[float, float]:
    """(outgoing, incoming) in seconds, from a client's `heart-beat` header; raises Refusal."""
    offered, _, wanted = header.partition(",")
    try:
        can_send, wants = (min(int(part), 86_400_000) / 1000 for part in (offered.strip(), wanted.strip()))
    except ValueError:
        can_send = wants = -1.0
    if can_send < 0 or wants < 0:
        raise Refusal("The heart-beat header is not two numbers of milliseconds.")
    outgoing = max(shortest, wants) if wants else 0.0
    incoming = max(shortest, can_send) if can_send else 0.0
    return outgoing, incoming
