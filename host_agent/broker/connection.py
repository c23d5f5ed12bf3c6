"""One client's connection: bytes in, frames handled in fair turns, messages and answers out."""

from __future__ import annotations

import enum
from time import perf_counter
from typing import TYPE_CHECKING, Any

from twisted.internet.interfaces import IDelayedCall, IHalfCloseableDescriptor, ITCPTransport
from twisted.internet.protocol import Protocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from host_agent.broker.destinations import Refusal
from host_agent.broker.frames import Frame, FrameError, FrameParser, encode, escape
from host_agent.broker.heart_beats import HeartBeats, agreed_intervals
from host_agent.broker.outlet import Outlet
from host_agent.broker.queues import Message, MessageQueue
from host_agent.broker.session import Session

if TYPE_CHECKING:
    from host_agent.broker.embedded import EmbeddedBroker

_VERSIONS = ("1.2", "1.1")
_LOGIN_BODY_BYTES = 1024


class State(enum.Enum):
    """Where a connection is in its life; it only moves downwards."""

    LOGIN = "waiting for CONNECT"
    OPEN = "logged in"
    CLOSING = "closing"
    CLOSED = "closed"


_ENDED = (State.CLOSING, State.CLOSED)


class BrokerConnection(Protocol):
    """Speaks STOMP with one client.

    Reading stops while one of these holds: frames wait for the connection's next turn,
    a SEND waits for room in its queue, or the client does not read its receipts.
    """

    log = Logger()
    transport: Any
    """A transport that is a consumer and a producer as well, which no single interface of Twisted says."""

    def __init__(self, broker: EmbeddedBroker, only_principal: str | None) -> None:
        self.outlet = Outlet(broker, self._output_drained)
        self._broker = broker
        self._limits = broker.limits
        self._only_principal = only_principal
        self._parser = FrameParser(broker.limits.frames, broker.known_heads, in_pieces=True)
        self._parser.body_bytes = min(_LOGIN_BODY_BYTES, broker.limits.frames.body_bytes)
        self._state = State.LOGIN
        self._session: Session | None = None
        self._peer = ""
        # At most one of these runs at a time: time to log in, to be held back, to close.
        self._timer: IDelayedCall | None = None
        self._heart_beats: HeartBeats | None = None
        self._reading = True
        self._in_turns = False
        self._frame_began = 0.0  # when the unfinished frame at the end of what was read began; 0 for none
        self._unread_answers = 0
        self._held: tuple[MessageQueue, Message, Frame] | None = None

    # Twisted's side

    def connectionMade(self) -> None:
        """A client has connected."""
        transport = self.transport
        self._peer = str(getattr(transport.getPeer(), "port", "of a socket"))
        if ITCPTransport.providedBy(transport):
            transport.setTcpNoDelay(True)
            transport.setTcpKeepAlive(True)
        self.outlet.attach(transport)
        refused = self._broker.connection_made(self)
        if refused:
            self._fail(refused)
            return
        self._timer = self._broker.reactor.callLater(self._limits.login_seconds, self._login_too_late)

    def dataReceived(self, data: bytes) -> None:
        """Bytes from the client."""
        self._broker.totals.bytes_received += len(data)
        if self._state in _ENDED:
            return
        if self._heart_beats is not None:
            self._heart_beats.received_at = self._broker.reactor.seconds()
        self._parser.feed(data)
        if self._reading:
            self._broker.work(self.take_turn)

    def connectionLost(self, reason: Failure | None = None) -> None:
        """The connection is gone, for whatever reason."""
        if self._state is State.OPEN:
            why = reason.getErrorMessage() if reason is not None else "no reason given"
            self.log.info("client {name} on port {peer} is gone: {why}", name=self._name, peer=self._peer, why=why)
        self._state = State.CLOSED
        self._leave()
        self._cancel_timer()
        self._broker.connection_lost(self)

    def _output_drained(self) -> None:
        if self._unread_answers:
            self._unread_answers = 0
            self._read_on()
        if self._session is not None:
            self._session.wake_subscriptions()

    # The broker's side

    def take_turn(self) -> bool:
        """Handle a bounded number of frames; returns whether the connection wants another turn."""
        parser = self._parser
        limits = self._limits
        spent = 0
        handled = False
        end = perf_counter() + limits.turn_seconds
        for _ in range(limits.frames_per_turn):
            if self._state in _ENDED:
                self._in_turns = False
                return False
            if self._held is not None or self._unread_answers > limits.answer_bytes:
                self._in_turns = False
                self._set_reading(False)
                return False
            try:
                frame = parser.next_frame()
            except FrameError as error:
                self._fail(str(error))
                continue
            if frame is None:
                # What is left is the beginning of a frame, so only reading can help.
                if not parser.in_frame:
                    self._frame_began = 0.0
                elif handled or not self._frame_began:
                    self._frame_began = self._broker.reactor.seconds()
                self._in_turns = False
                self._set_reading(True)
                return False
            self._handle(frame)
            handled = True
            spent += frame.length
            if spent > limits.bytes_per_turn or perf_counter() > end:
                break
        self._set_reading(False)
        if not self._in_turns:
            self._in_turns = True
            self._broker.wants_turn(self)
        return True

    def look_at_unfinished_frame(self, now: float) -> None:
        """End the connection when a frame takes too long: it may come byte by byte and never end."""
        if self._frame_began and self._reading and now - self._frame_began > self._limits.frame_seconds:
            self._fail(f"A frame has not come whole within {self._limits.frame_seconds:g} seconds.")

    @property
    def held_queue(self) -> MessageQueue | None:
        """The full queue for which this client waits."""
        return self._held[0] if self._held is not None else None

    def hold(self, queue: MessageQueue, message: Message, frame: Frame) -> None:
        """Read nothing more from this client until its message fits into the queue."""
        # The frame is kept for its receipt; its body is in the message.
        self._held = (queue, message, Frame(frame.command, frame.headers))
        queue.senders_waiting += 1
        self._broker.hold_back(self)
        self._timer = self._broker.reactor.callLater(self._limits.full_queue_seconds, self._held_too_long)

    def retry_held(self) -> bool:
        """Put the message that waits for room; returns False while there is none."""
        if self._held is None:
            return True
        queue, message, frame = self._held
        if not queue.has_room(message.size):
            return False
        self._held = None
        queue.senders_waiting -= 1
        self._cancel_timer()
        queue.put(message)
        self.answer_receipt(frame)
        self._read_on()
        return True

    def close(self, sentence: str = "") -> None:
        """End the connection; with a sentence, an ERROR frame says why."""
        if sentence:
            self._fail(sentence)
        else:
            if self._state is State.OPEN:
                self.log.info("client {name} on port {peer} has left", name=self._name, peer=self._peer)
            self._end()

    def abort(self) -> None:
        """End the connection without waiting for the client."""
        if self.transport is not None:
            self.transport.abortConnection()

    def answer_receipt(self, frame: Frame) -> None:
        """Write the RECEIPT for a frame that asks for one."""
        receipt = frame.headers.get("receipt")
        if receipt is not None:
            self._write_answer(b"RECEIPT\nreceipt-id:%b\n\n\0" % escape(receipt).encode())

    # Helpers

    @property
    def _name(self) -> str:
        return self._session.principal.name if self._session is not None else "nobody yet"

    def _handle(self, frame: Frame) -> None:
        try:
            if self._session is not None:
                self._session.handle(frame)
            elif frame.command in ("CONNECT", "STOMP"):
                self._connect(frame)
            else:
                raise Refusal("The first frame of a connection must be CONNECT or STOMP.")
        except Refusal as refusal:
            self._fail(str(refusal), frame.headers.get("receipt"))

    def _connect(self, frame: Frame) -> None:
        headers = frame.headers
        limits = self._limits
        accepted = [version.strip() for version in headers.get("accept-version", "1.0").split(",")]
        version = next((version for version in _VERSIONS if version in accepted), None)
        if version is None:
            raise Refusal("This broker speaks STOMP 1.2 and 1.1: put accept-version:1.1,1.2 into CONNECT.")
        outgoing, incoming = agreed_intervals(headers.get("heart-beat", "0,0"), limits.heart_beat_seconds)
        login = headers.get("login", "")
        principal = self._broker.authenticate(login, headers.get("passcode", ""))
        if principal is None or self._only_principal not in (None, principal.name):
            right = principal is not None
            self.log.warn(
                "refused the login {login!r}: {why}",
                login=login[:100],
                why=f"only {self._only_principal} may log in here" if right else "unknown, or a wrong passcode",
            )
            raise Refusal("The login or its passcode is wrong, or may not be used from here.")
        self._cancel_timer()
        self._session = Session(self._broker, self, principal, version)
        self._state = State.OPEN
        self._parser.body_bytes = limits.frames.body_bytes
        if outgoing or incoming:
            self._heart_beats = HeartBeats(
                self._broker.reactor,
                outgoing=outgoing,
                incoming=incoming,
                patience=limits.heart_beat_grace,
                is_silent=self.outlet.is_silent,
                send=self._send_heart_beat,
                give_up=self._heart_beat_missing,
            )
        shortest = int(limits.heart_beat_seconds * 1000)
        answer = {
            "version": version,
            "server": self._broker.server_name,
            "session": self._broker.next_session(),
            "heart-beat": f"{shortest},{shortest}",
        }
        self._write_answer(encode("CONNECTED", answer))
        self.log.info("client {name} is here on port {peer}", name=principal.name, peer=self._peer)

    def _read_on(self) -> None:
        """A reason not to read may have ended; what is left unread gets its turn with the others."""
        if self._state not in _ENDED and not self._in_turns:
            self._in_turns = True
            self._broker.wants_turn(self)

    def _set_reading(self, reading: bool) -> None:
        if reading != self._reading and self.transport is not None and self._state not in _ENDED:
            self._reading = reading
            if reading:
                if self._frame_began:
                    self._frame_began = self._broker.reactor.seconds()
                if self._heart_beats is not None:
                    self._heart_beats.received_at = self._broker.reactor.seconds()
                self.transport.resumeProducing()
            else:
                self.transport.pauseProducing()

    def _write_answer(self, data: bytes) -> None:
        if self.outlet.paused:
            self._unread_answers += len(data)
        self.outlet.write(data)

    def _send_heart_beat(self) -> None:
        if not self.outlet.paused:
            self.outlet.write(b"\n")

    def _heart_beat_missing(self) -> None:
        if self._heart_beats is not None and not self._reading:
            # It is we who do not read, so the silence says nothing.
            self._heart_beats.reprieve()
        else:
            self._fail("No heart-beat has come from this client within the agreed time.")

    def _login_too_late(self) -> None:
        self._fail(f"No login has come within {self._limits.login_seconds:g} seconds.")

    def _held_too_long(self) -> None:
        if self._held is not None:
            queue, _, frame = self._held
            self._fail(
                f"The queue {queue.name} has been full for {self._limits.full_queue_seconds:g} seconds: "
                "start a consumer for it, or send less.",
                frame.headers.get("receipt"),
            )

    def _cancel_timer(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None

    def _fail(self, sentence: str, receipt: str | None = None) -> None:
        """Send an ERROR frame with this sentence, and close."""
        if self._state in _ENDED:
            return
        self.log.warn(
            "closing the connection of {name} on port {peer}: {sentence}",
            name=self._name,
            peer=self._peer,
            sentence=sentence,
        )
        headers = {"message": sentence, "content-type": "text/plain"}
        if receipt is not None:
            headers["receipt-id"] = receipt
        self._write_answer(encode("ERROR", headers, sentence.encode()))
        self._end()

    def _end(self) -> None:
        """Close, once the client has read what was written; it has a limited time for that."""
        if self._state in _ENDED:
            return
        self._state = State.CLOSING
        self._leave()
        self._cancel_timer()
        transport = self.transport
        if transport is None:
            return
        transport.unregisterProducer()
        self._timer = self._broker.reactor.callLater(self._limits.closing_seconds, self.abort)
        can_half_close = IHalfCloseableDescriptor.providedBy(transport)
        if can_half_close:
            # Closing with unread bytes makes a TCP reset that takes the ERROR frame away from the
            # client, so we end our side, and read and forget until the client ends its own.
            transport.loseWriteConnection()
            self._set_reading(True)
        else:
            transport.loseConnection()

    def _leave(self) -> None:
        """Give back what this client holds, and stop taking part."""
        # Or what one of its subscriptions gives back would be delivered to another.
        self.outlet.end()
        if self._heart_beats is not None:
            self._heart_beats.stop()
            self._heart_beats = None
        if self._held is not None:
            queue = self._held[0]
            self._held = None
            queue.senders_waiting -= 1
            self._broker.destinations.remove_if_unused(queue)
            self._broker.room_made()
        if self._session is not None:
            self._session.end()
