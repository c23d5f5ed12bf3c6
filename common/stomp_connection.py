"""One STOMP connection by stomp.py, with its socket made by us: TLS, no delay for small frames, bounded everything.

All calls may block and are made in threads; `abort` is the exception, it ends them.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import stomp.connect
import stomp.exception
import stomp.listener
import stomp.protocol
import stomp.transport

from .errors import ConfigError
from .tls import TlsError, TlsSocket

if TYPE_CHECKING:
    from .broker_address import BrokerAddress, Credentials

HEARTBEAT_MS = 10_000
CONNECT_TIMEOUT = 20.0  # seconds for TCP and TLS, and again for the broker's CONNECTED
SEND_TIMEOUT = 30.0  # seconds without a byte taken by the broker
FAREWELL_SECONDS = 2.0
MOST_FRAME = 2 * 1024 * 1024  # bytes of one frame from the broker
HELD_UP = f"took nothing of what we send for {SEND_TIMEOUT:.0f} s"

_TLS_ALERT = b"\x15\x03"
_READ = 65536


class StompConnection(stomp.listener.ConnectionListener):  # type: ignore[misc]
    """Used once. `reason` is why it is of no use any more: the rest of a sentence about the broker."""

    def __init__(
        self,
        address: BrokerAddress,
        credentials: Credentials,
        receive: Callable[[StompConnection, int, bytes], None],
        on_lost: Callable[[], None],
    ) -> None:
        """`receive` gets the subscription's number and the body, in stomp.py's thread; `on_lost` is called in any."""
        self._credentials = credentials
        self._receive = receive
        self._on_lost = on_lost
        self._answered = threading.Event()
        self._in_order = self._closed = False
        self.lost = threading.Event()
        self.reason = ""
        self._stomp = self._make(address)
        self._transport = self._stomp.transport
        self._stomp.set_listener("link", self)

    def _make(self, address: BrokerAddress) -> Stomp:
        return Stomp(address)

    def _login_headers(self) -> dict[str, str]:
        return {}

    def open(self, stopping: threading.Event) -> str:
        """Connect and log in. Returns "" or why it could not."""
        credentials = self._credentials
        try:
            self._stomp.connect(
                credentials.login, credentials.passcode, headers=self._login_headers(), with_connect_command=True
            )
        except (TlsError, ConfigError) as error:
            return str(error)
        except OSError as error:
            return f"cannot be reached: {_why(error)}"
        except Exception as error:
            return self.reason or f"cannot be used ({type(error).__name__})"
        deadline = time.monotonic() + CONNECT_TIMEOUT
        if not self._await_answer(stopping, deadline):
            if stopping.is_set():
                return "was not awaited any longer"
            return f"accepted the connection but did not answer CONNECT within {CONNECT_TIMEOUT:.0f} s"
        if not self.lost.is_set():
            self._in_order = True
        return self.reason

    def _await_answer(self, stopping: threading.Event, deadline: float) -> bool:
        """False when there is none, in time or at all any more."""
        while not self._answered.wait(0.1):
            if stopping.is_set() or time.monotonic() > deadline:
                return False
        return True

    def subscribe(self, destination: str, number: int, headers: Mapping[str, str] | None = None) -> None:
        self._stomp.subscribe(destination, id=str(number), ack="auto", headers=dict(headers or {}))

    def unsubscribe(self, number: int) -> None:
        self._stomp.unsubscribe(id=str(number))

    def send(self, destination: str, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self._stomp.send(destination, body, content_type="application/octet-stream", headers=dict(headers or {}))

    def fail(self, reason: str) -> None:
        """The connection is of no use any more; wakes whoever waits for it."""
        self.reason = self.reason or reason
        self.lost.set()
        self._answered.set()
        self._on_lost()

    def abort(self) -> None:
        """End the connection whatever its threads wait for; never blocks."""
        self._transport.abort()

    def close(self) -> None:
        """Disconnect: by receipt when the connection is in order, which says that all was taken."""
        if self._closed:
            return
        self._closed = True
        self._stomp.remove_listener("link")
        if self._in_order and not self.lost.is_set():
            done = threading.Event()
            self._stomp.set_listener("farewell", _Farewell(done))
            try:
                self._stomp.disconnect("farewell")
                done.wait(FAREWELL_SECONDS)
            except Exception:
                pass  # it is closed below, in order or not
        self.lost.set()
        try:
            self._transport.disconnect_socket()
        except Exception:
            pass

    # -- called by stomp.py

    def on_connected(self, frame: Any) -> None:
        self._answered.set()

    def on_message(self, frame: Any) -> None:
        body = frame.body if isinstance(frame.body, bytes) else str(frame.body or "").encode()
        number = frame.headers.get("subscription", "")
        if number.isascii() and number.isdigit() and len(number) < 10:
            self._receive(self, int(number), body)

    def on_error(self, frame: Any) -> None:
        body = frame.body if isinstance(frame.body, bytes) else str(frame.body or "").encode()
        said = " ".join(f"{frame.headers.get('message', '')} {body[:500].decode('utf-8', 'replace')}".split())
        if not self._answered.is_set():
            self.fail(f"refuses the login {self._credentials.login!r}: {said[:300]}")
        else:
            self.fail(f"says: {said[:300]}")

    def on_disconnected(self) -> None:
        if self._transport.fault:
            self.fail(self._transport.fault)
        elif self._answered.is_set():
            self.fail("closed the connection")
        elif self._transport.tls:
            self.fail("closed the connection instead of answering CONNECT; is this its STOMP port?")
        else:
            self.fail("closed the connection instead of answering CONNECT; is this its STOMP port, and without TLS?")


class Stomp(stomp.connect.BaseConnection, stomp.protocol.Protocol12):  # type: ignore[misc]
    """stomp.py's connection class with a transport of our own."""

    def __init__(self, address: BrokerAddress, heartbeats: tuple[int, int] = (HEARTBEAT_MS, HEARTBEAT_MS)) -> None:
        """`heartbeats` in milliseconds, ours and the broker's."""
        transport = _Transport(address)
        stomp.connect.BaseConnection.__init__(self, transport)
        stomp.protocol.Protocol12.__init__(self, transport, heartbeats, True)

    def connect(self, *args: Any, **kwargs: Any) -> None:
        self.transport.start()
        stomp.protocol.Protocol12.connect(self, *args, **kwargs)

    def escaped(self, text: str) -> str:
        """As the value of a header."""
        headers = {"": text}
        self._escape_headers(headers)
        return headers[""]

    def disconnect(self, receipt: str | None = None, **kwargs: Any) -> None:
        # Only sends DISCONNECT. stomp.py's own connections then wait for their threads, without a bound.
        stomp.protocol.Protocol12.disconnect(self, receipt, **kwargs)


class _Transport(stomp.transport.Transport):  # type: ignore[misc]
    """stomp.py's transport with our socket. Blocking in both directions, in two threads."""

    def __init__(self, address: BrokerAddress) -> None:
        # RabbitMQ's virtual host; the others do not look at it.
        super().__init__([(address.host, address.port)], vhost="/", auto_decode=False)
        self.socket: Any = None
        self._address = address
        self.write: Callable[[bytes], None] | None = None  # who sends, if not this does
        self.network: socket.socket | None = None
        self._aborted = False
        self._unfinished = 0  # bytes since the last whole frame
        self.tls = address.tls is not None
        self.fault = ""

    def attempt_connection(self) -> None:
        address = self._address
        network = self.network = socket.create_connection((address.host, address.port), CONNECT_TIMEOUT)
        try:
            if network.getsockname() == network.getpeername():
                # Nobody listens there, and the system has given us that very port as our own.
                raise ConnectionRefusedError("connection refused")
            # Without this, Nagle's algorithm and delayed ACKs cost 40 ms for every small exchange.
            network.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.socket = TlsSocket(network, address.tls, address.host) if address.tls else network
            if self._aborted:
                raise ConnectionAbortedError("given up")
            network.settimeout(None)
            network.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeout_option(SEND_TIMEOUT))
        except BaseException:
            self.socket = None
            network.close()
            raise
        self.current_host_and_port = (address.host, address.port)

    def receive(self) -> bytes:
        data: bytes = self.socket.recv(_READ)
        if not self.connected and not self.tls and data.startswith(_TLS_ALERT):
            self.fault = "speaks TLS on this port; give the certificate of its authority (CA)"
            raise stomp.exception.ConnectionClosedException
        self._unfinished += len(data)
        if self._unfinished > MOST_FRAME:
            self.fault = f"sent a frame of more than {MOST_FRAME} bytes"
            raise stomp.exception.ConnectionClosedException
        return data

    def process_frame(self, frame: Any, text: Any) -> None:
        self._unfinished = 0
        super().process_frame(frame, text)

    def send(self, encoded_frame: bytes) -> None:
        if self.write is not None:
            self.write(encoded_frame)
        else:
            super().send(encoded_frame)

    def disconnect_socket(self) -> None:
        if self.write is not None:
            return  # whoever sends closes it, too
        if threading.current_thread().name.startswith("StompHeartbeat"):
            self.fault = self.fault or "fell silent (no heart-beat)"
        super().disconnect_socket()

    def abort(self) -> None:
        self._aborted = True
        network = self.network
        if network is not None:
            try:
                network.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it is closed already


class _Farewell(stomp.listener.ConnectionListener):  # type: ignore[misc]
    def __init__(self, done: threading.Event) -> None:
        self._done = done

    def on_receipt(self, frame: Any) -> None:
        self._done.set()

    def on_disconnected(self) -> None:
        self._done.set()


def _timeout_option(seconds: float) -> bytes | int:
    """SO_SNDTIMEO's value: a struct timeval, on Windows milliseconds."""
    if sys.platform == "win32":
        return int(seconds * 1000)
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))


def _why(error: OSError) -> str:
    if isinstance(error, (socket.timeout, TimeoutError)):  # Python 3.9 keeps them apart
        return f"no answer within {CONNECT_TIMEOUT:.0f} s"
    if isinstance(error, socket.gaierror):
        return f"its name is not known ({error.strerror})"
    return (error.strerror or str(error) or type(error).__name__).lower()
