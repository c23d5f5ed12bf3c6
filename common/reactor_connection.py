"""A STOMP connection that is made in a thread and then lives in the reactor: no thread waits for it, none hands over.

stomp.py connects, logs in, subscribes and says goodbye; its receiver and its heart-beats would be a thread each. What
is sent and received all the time, SEND and MESSAGE, is written and read here. Threads that wait for Python's one lock
take it from each other every 5 ms, which an emulated guest feels in each command; and a thousand guests in one
process would be three thousand threads.
"""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import stomp.exception
import stomp.utils
from twisted.internet.interfaces import IReadDescriptor, IWriteDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

from . import stomp_connection
from .stomp_connection import HEARTBEAT_MS, HELD_UP, MOST_FRAME, Stomp, StompConnection
from .tls import TlsSocket

if TYPE_CHECKING:
    from .broker_address import BrokerAddress, Credentials

_READ = 65536
_PATIENCE = 1.5  # times the broker's interval that may pass without a word from it
_HEAD_END = re.compile(rb"\n\r?\n")
_LENGTH = re.compile(rb"\ncontent-length:(\d{1,9})\r?\n")
_SUBSCRIPTION = re.compile(rb"\nsubscription:(\d{1,9})\r?\n")


class FrameBuffer:
    """Cuts what comes from the network into frames, without the NUL at their ends. Bounded by `MOST_FRAME`."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> None:
        self._bytes += data

    def next(self) -> tuple[bytes, int] | None:
        """The next whole frame and where its body begins; None: more must come first. OverflowError: too large."""
        data = self._bytes
        start = 0
        while start < len(data) and data[start] in b"\r\n":  # heart-beats, and what may stand between frames
            start += 1
        if start:
            del data[:start]
        head = _HEAD_END.search(data)
        if head is not None:
            body = head.end()
            length = _LENGTH.search(data, 0, body)
            end = body + int(length[1]) if length is not None else data.find(b"\0", body)
            if body <= end < len(data):
                frame = bytes(data[:end])
                del data[: end + 1]
                return frame, body
        if len(data) > MOST_FRAME:
            raise OverflowError
        return None


@implementer(IReadDescriptor, IWriteDescriptor)
class ReactorConnection(StompConnection):
    """`open` blocks and is called in a thread; from `begin` on everything is the reactor's, but `abort`."""

    def __init__(
        self,
        reactor: Any,
        address: BrokerAddress,
        credentials: Credentials,
        receive: Callable[[StompConnection, int, bytes], None],
    ) -> None:
        super().__init__(address, credentials, receive, lambda: None)
        self._reactor = reactor
        self._buffer = FrameBuffer()
        self._outgoing = bytearray()
        self._begun = False
        self._tls: TlsSocket | None = None
        self._network: socket.socket
        self._beat_every = self._silence_most = 0.0  # seconds; 0: not agreed
        self._spoke = False  # since the last heart-beat was due
        self._heard_at = self._moved_at = 0.0
        self._timers: dict[str, Any] = {}
        self._heads: dict[str, bytes] = {}  # of SEND, by destination

    def _make(self, address: BrokerAddress) -> Stomp:
        made = Stomp(address, (0, 0))  # its heart-beats would be a thread
        made.transport.override_threading(lambda receiver: None)
        return made

    def _login_headers(self) -> dict[str, str]:
        return {"heart-beat": f"{HEARTBEAT_MS},{HEARTBEAT_MS}"}

    @property
    def backlog(self) -> int:
        """Bytes that the broker has not taken."""
        return len(self._outgoing)

    # -- in the thread

    def _await_answer(self, stopping: threading.Event, deadline: float) -> bool:
        network = self._transport.network
        network.settimeout(0.1)
        while not self._answered.is_set():
            if stopping.is_set() or time.monotonic() > deadline:
                return False
            try:
                data = self._transport.receive()
            except socket.timeout:
                continue
            except (OSError, stomp.exception.ConnectionClosedException):
                data = b""
            if data:
                self._buffer.feed(data)
                self._take_frames(most=1)  # what follows CONNECTED is the reactor's
            else:
                self.on_disconnected()
        return True

    def on_connected(self, frame: Any) -> None:
        theirs = frame.headers.get("heart-beat", "0,0").replace(" ", "").split(",")
        send_ms, receive_ms = stomp.utils.calculate_heartbeats(theirs, (HEARTBEAT_MS, HEARTBEAT_MS))
        self._beat_every, self._silence_most = send_ms / 1000, receive_ms / 1000 * _PATIENCE
        super().on_connected(frame)

    # -- in the reactor

    def begin(self) -> None:
        """The reactor reads and writes from now on."""
        self._begun = True
        self._network = self._transport.network
        self._network.setblocking(False)
        if isinstance(self._transport.socket, TlsSocket):
            self._tls = self._transport.socket
        self._transport.write = self._write
        self._heard_at = time.monotonic()
        self._reactor.addReader(self)
        due = [seconds / 2 for seconds in (self._beat_every, self._silence_most) if seconds]
        if due:
            self._look_at_silence(min(due))
        self._reactor.callLater(0, self._heard, b"")  # what came with CONNECTED

    def send(self, destination: str, body: bytes, headers: Any = None) -> None:
        head = self._heads.get(destination)
        if head is None:
            name = self._stomp.escaped(destination).encode()
            head = b"SEND\ndestination:%b\ncontent-type:application/octet-stream\ncontent-length:" % name
            if len(self._heads) < 1000:
                self._heads[destination] = head
        self._write(b"%b%d\n\n%b\0" % (head, len(body), body))

    def farewell(self) -> None:
        """Disconnect by receipt: when the broker has taken everything, the connection is `lost`."""
        try:
            self._stomp.disconnect("farewell")
        except Exception:
            self.fail("broke the connection")

    def on_receipt(self, frame: Any) -> None:
        self.fail("was left")

    def detach(self) -> None:
        """Nothing of this connection is the reactor's any more."""
        if not self._begun:
            return
        self._begun = False
        self._reactor.removeReader(self)
        self._reactor.removeWriter(self)
        for timer in self._timers.values():
            if timer.active():
                timer.cancel()
        self._network.close()

    def close(self) -> None:
        """After `open` did not succeed."""
        if not self._begun:
            super().close()

    def _write(self, data: bytes) -> None:
        if self.lost.is_set() or not self._begun:
            return
        self._spoke = True
        self._put(self._tls.encrypt(data) if self._tls is not None else data)

    def _put(self, data: bytes) -> None:
        if self._outgoing:
            self._outgoing += data
            return
        sent = self._push(data)
        if sent < len(data) and not self.lost.is_set():
            self._outgoing += memoryview(data)[sent:]
            self._moved_at = time.monotonic()
            self._reactor.addWriter(self)
            self._look_at_backlog()

    def _push(self, data: bytes | bytearray) -> int:
        try:
            return self._network.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self.fail(f"broke the connection ({type(error).__name__})")
            return 0

    def _look_at_backlog(self) -> None:
        if not self._outgoing or self.lost.is_set():
            return
        left = self._moved_at + stomp_connection.SEND_TIMEOUT - time.monotonic()
        if left <= 0:
            self.fail(HELD_UP)
        else:
            self._timers["backlog"] = self._reactor.callLater(left, self._look_at_backlog)

    def _look_at_silence(self, due: float) -> None:
        if self.lost.is_set():
            return
        if self._silence_most and time.monotonic() - self._heard_at > self._silence_most:
            self.fail("fell silent (no heart-beat)")
            return
        if self._beat_every and not self._spoke:
            self._write(b"\n")
        self._spoke = False
        self._timers["silence"] = self._reactor.callLater(due, self._look_at_silence, due)

    def fileno(self) -> int:
        return self._network.fileno()

    def logPrefix(self) -> str:
        return "broker"

    def doWrite(self) -> None:
        sent = self._push(self._outgoing)
        if sent:
            del self._outgoing[:sent]
            self._moved_at = time.monotonic()
        if not self._outgoing or self.lost.is_set():
            self._reactor.removeWriter(self)

    def doRead(self) -> None:
        if self.lost.is_set():
            self._reactor.removeReader(self)
            return
        try:
            data = self._network.recv(_READ)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if data:
            self._heard(data)
        else:
            self._reactor.removeReader(self)
            self.on_disconnected()

    def _heard(self, data: bytes) -> None:
        self._heard_at = time.monotonic()
        if self._tls is not None:
            try:
                data, ended = self._tls.decrypt(data)
                if said := self._tls.said():
                    self._put(said)
            except ssl.SSLError:
                data, ended = b"", True
            self._buffer.feed(data)
            self._take_frames()
            if ended:
                self.on_disconnected()
            return
        self._buffer.feed(data)
        self._take_frames()

    def _take_frames(self, most: int = 1 << 30) -> None:
        try:
            while most and not self.lost.is_set() and (found := self._buffer.next()) is not None:
                frame, body = found
                number = _SUBSCRIPTION.search(frame, 0, body) if frame.startswith(b"MESSAGE") else None
                if number is not None:
                    self._receive(self, int(number[1]), frame[body:])
                else:
                    self._transport.process_frame(stomp.utils.parse_frame(frame), frame)
                most -= 1
        except OverflowError:
            self.fail(f"sent a frame of more than {MOST_FRAME} bytes")

    def connectionLost(self, reason: Failure) -> None:
        """The reactor ends."""
        self.fail("is of no use to a program that ends")
