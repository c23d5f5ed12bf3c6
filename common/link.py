"""The link between two agents: over any broker, numbered messages arrive in order and once per pair of sessions.

Each side has a *session*: a random id that is new whenever the process (or its memory) starts over. The numbering
belongs to the pair of sessions. A message that is meant for another session is an echo of the past and is dropped.

    IDLE ──HELLO/WELCOME──▶ OPEN ──new session of the peer──▶ OPEN (numbering from 1)
      ▲                      │
      └────────renew─────────┘
When a session begins, whatever was on its way is dropped: both sides have just told each other what they hold, and
ask for what is missing (`docs/protocol.md`).

The sender keeps every numbered message until it is acknowledged and sends all of them again after a reconnection
or when nothing was acknowledged for a while. At most `WINDOW` messages or bytes are on their way; more wait
in a queue, and `congested` asks the producer to pause: this is how back-pressure reaches a program's output.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable
from typing import Protocol

import attrs
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from . import messages
from .messages import Envelope, Message

WINDOW_MESSAGES = 64
WINDOW_BYTES = 2 * 1024 * 1024
RESEND_AFTER = 3.0  # seconds without an acknowledgement; grows up to RESEND_MOST
RESEND_MOST = 30.0
ACK_AFTER = 1.0  # seconds that an acknowledgement waits for a message to carry it; far below the peer's RESEND_AFTER
ACK_EVERY_MESSAGES = 16
ACK_EVERY_BYTES = 128 * 1024  # a fast stream must not wait for the timer


def new_session() -> str:
    """A session id: 64 random bits."""
    return secrets.token_hex(8)


class Transmit(Protocol):
    """Puts one body on its way to the peer; it may be lost."""

    def __call__(self, body: bytes, /) -> None: ...


@attrs.define
class _Pending:
    seq: int
    message: Message
    size: int
    acknowledged: Callable[[], None] | None


class _Alarm:
    """Calls `ring` once when its time has come.

    It is set and stopped with each message, and hardly ever rings: so the clock is not told of that. When its call
    comes, it is looked whether it still holds.
    """

    def __init__(self, clock: IReactorTime, ring: Callable[[], None]) -> None:
        self._clock = clock
        self._ring = ring
        self._at: float | None = None
        self._call: IDelayedCall | None = None

    @property
    def is_set(self) -> bool:
        return self._at is not None

    def set(self, seconds: float) -> None:
        self._at = self._clock.seconds() + seconds
        if self._call is not None and self._call.getTime() > self._at:
            self._call.cancel()
            self._call = None
        if self._call is None:
            self._call = self._clock.callLater(seconds, self._look)

    def stop(self) -> None:
        self._at = None

    def close(self) -> None:
        self.stop()
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def _look(self) -> None:
        self._call = None
        if self._at is None:
            return
        left = self._at - self._clock.seconds()
        if left > 0:
            self._call = self._clock.callLater(left, self._look)
        else:
            self._at = None
            self._ring()


class Link:
    """One side of a link.

    `deliver` gets each message of the open session: numbered ones in order and once, others as they come.
    """

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        session: str,
        transmit: Transmit,
        deliver: Callable[[Message], None],
    ) -> None:
        self.session = session
        self.peer = ""  # the peer's session, once known
        self._transmit = transmit
        self._deliver = deliver
        self._next_seq = 1
        self._sent: deque[_Pending] = deque()  # on their way, not acknowledged
        self._sent_bytes = 0
        self._waiting: deque[_Pending] = deque()  # outside the window
        self._received = 0  # last number received without a gap
        self._unacknowledged = 0  # messages received since we last told the peer
        self._unacknowledged_bytes = 0
        self._ack = _Alarm(clock, self._send_ack)
        self._resend = _Alarm(clock, self._resend_due)
        self._resend_after = RESEND_AFTER

    # -- sending

    @property
    def congested(self) -> bool:
        """True while messages wait outside the window, or nobody is there: producers should pause."""
        return bool(self._waiting) or not self.peer

    @property
    def unacknowledged(self) -> int:
        """How many numbered messages the peer has not acknowledged."""
        return len(self._sent) + len(self._waiting)

    def send(self, message: Message, acknowledged: Callable[[], None] | None = None) -> None:
        """Send a message; `acknowledged` is called when the peer has a numbered one.

        Without a session a numbered message goes nowhere: when one begins, its sender looks what is missing.
        """
        if not message.NUMBERED:
            self._put(0, message)
            return
        if not self.peer:
            return
        size = len(getattr(message, "payload", b"")) + 256
        pending = _Pending(self._next_seq, message, size, acknowledged)
        self._next_seq += 1
        self._waiting.append(pending)
        self._fill_window()

    def _fill_window(self) -> None:
        while (
            self._waiting and len(self._sent) < WINDOW_MESSAGES and (self._sent_bytes < WINDOW_BYTES or not self._sent)
        ):
            pending = self._waiting.popleft()
            self._sent.append(pending)
            self._sent_bytes += pending.size
            self._put(pending.seq, pending.message)
        if self._sent and not self._resend.is_set:
            self._resend.set(self._resend_after)

    def _put(self, seq: int, message: Message) -> None:
        self._acknowledgement_went_out()
        self._transmit(messages.encode(Envelope(message, self.session, self.peer, seq, self._received)))

    def resend(self) -> None:
        """Send again everything that is on its way: after a reconnection, or when the peer is silent."""
        for pending in self._sent:
            self._put(pending.seq, pending.message)
        self._fill_window()

    def _resend_due(self) -> None:
        if self._sent:
            self._resend_after = min(self._resend_after * 2, RESEND_MOST)
            self._log.debug("no acknowledgement: sending {n} messages again", n=len(self._sent))
            self.resend()

    # -- receiving

    def open(self, peer_session: str) -> bool:
        """The peer said who it is. True when this is a new session of it: the numbering starts anew."""
        if peer_session == self.peer:
            self.resend()
            return False
        self._begin()
        self.peer = peer_session
        return True

    def renew(self, session: str) -> None:
        """Our own memory has gone another way (a restore): a new session, and no peer until it is opened again."""
        self._begin()
        self.session, self.peer = session, ""

    def _begin(self) -> None:
        self._received = self._unacknowledged = self._unacknowledged_bytes = 0
        self._sent.clear()
        self._waiting.clear()
        self._sent_bytes = 0
        self._next_seq = 1

    def received(self, envelope: Envelope) -> None:
        """Take a message from the broker."""
        if envelope.receiver != self.session or (self.peer and envelope.sender != self.peer):
            self._log.debug("dropped {t}: it belongs to another session", t=envelope.message.NAME)
            return
        ends = (self.session, self.peer)
        self._take(envelope)
        if ends == (self.session, self.peer):
            # Now: the message that brings an acknowledgement, a RESULT perhaps, says more of what was sent than that.
            self._take_ack(envelope.ack)

    def _take(self, envelope: Envelope) -> None:
        if isinstance(envelope.message, messages.Ack):
            return
        if not envelope.message.NUMBERED:
            self._deliver(envelope.message)
            return
        if envelope.seq != self._received + 1:
            # A repeat, or a gap that the sender will close by sending everything again.
            self._schedule_ack()
            return
        self._received = envelope.seq
        self._unacknowledged += 1
        self._unacknowledged_bytes += len(getattr(envelope.message, "payload", b""))
        self._deliver(envelope.message)
        if self._unacknowledged >= ACK_EVERY_MESSAGES or self._unacknowledged_bytes >= ACK_EVERY_BYTES:
            self._send_ack()
        elif self._unacknowledged:
            self._schedule_ack()

    def _take_ack(self, ack: int) -> None:
        progress = False
        while self._sent and self._sent[0].seq <= ack:
            pending = self._sent.popleft()
            self._sent_bytes -= pending.size
            progress = True
            if pending.acknowledged is not None:
                pending.acknowledged()
        if progress:
            self._resend_after = RESEND_AFTER
            self._resend.stop()
            self._fill_window()

    def _schedule_ack(self) -> None:
        if not self._ack.is_set:
            self._ack.set(ACK_AFTER)

    def _send_ack(self) -> None:
        self._put(0, messages.Ack())

    def _acknowledgement_went_out(self) -> None:
        self._unacknowledged = self._unacknowledged_bytes = 0
        self._ack.stop()

    def close(self) -> None:
        """Stop all timers; nothing is sent any more."""
        self._ack.close()
        self._resend.close()
        self._sent.clear()
        self._waiting.clear()
