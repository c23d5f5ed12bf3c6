"""A small blocking STOMP client on a bare socket: it can send what no library would."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterable, Mapping
from types import TracebackType

import attrs


@attrs.frozen
class RawFrame:
    """One frame as it was received, header escapes resolved."""

    command: str
    headers: dict[str, str]
    body: bytes


class RawStomp:
    """One connection; every call ends by its deadline, with TimeoutError or ConnectionError if need be."""

    def __init__(self, host: str, port: int, *, seconds: float = 10.0, ca: str = "") -> None:
        """With `ca`, the PEM of an authority, the connection is by TLS."""
        self._seconds = seconds
        self._socket = socket.create_connection((host, port), timeout=seconds)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if ca:
            context = ssl.create_default_context(cadata=ca)
            self._socket = context.wrap_socket(self._socket, server_hostname=host)
        self._buffer = b""
        self._kept: list[RawFrame] = []

    def __enter__(self) -> RawStomp:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connection without a word."""
        self._socket.close()

    def send_bytes(self, data: bytes) -> None:
        """Send anything."""
        self._socket.sendall(data)

    def send(self, command: str, headers: Mapping[str, str] | None = None, body: bytes = b"") -> None:
        """Send one frame."""
        self._socket.sendall(encode(command, headers or {}, body))

    def login(self, login: str, passcode: str, **headers: str) -> RawFrame:
        """CONNECT, and the CONNECTED or ERROR frame that answers it; `heart_beat` sets `heart-beat`."""
        sent = {"accept-version": "1.2", "host": "/", "login": login, "passcode": passcode}
        sent.update({name.replace("_", "-"): value for name, value in headers.items()})
        self.send("CONNECT", sent)
        return self.receive()

    def receive(self, seconds: float | None = None) -> RawFrame:
        """The next frame; heart-beats before it are skipped."""
        deadline = time.monotonic() + (self._seconds if seconds is None else seconds)
        if self._kept:
            return self._kept.pop(0)
        while True:
            frame = self._take_frame()
            if frame is not None:
                return frame
            self._buffer += self._receive_some(deadline)

    def put_back(self, frames: Iterable[RawFrame]) -> None:
        """Let `receive()` give these frames again, before any others."""
        self._kept[:0] = frames

    def receive_bytes(self, seconds: float | None = None) -> bytes:
        """What arrives next, as it is; empty when the broker has closed."""
        data, self._buffer = self._buffer, b""
        if data:
            return data
        self._socket.settimeout(self._seconds if seconds is None else seconds)
        return self._socket.recv(65536)

    def stays_silent(self, seconds: float) -> bool:
        """Whether no frame comes in this time; one that comes is kept."""
        deadline = time.monotonic() + seconds
        try:
            while not self._buffer.lstrip(b"\r\n"):
                self._buffer += self._receive_some(deadline)
        except TimeoutError:
            return True
        return False

    def is_closed(self, seconds: float) -> bool:
        """Whether the broker ends the connection within this time; what it sends before is dropped."""
        deadline = time.monotonic() + seconds
        try:
            while True:
                self._receive_some(deadline)
        except TimeoutError:
            return False
        except OSError:  # reset, or by TLS
            return True

    def _receive_some(self, deadline: float) -> bytes:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the broker has not sent what was expected")
        self._socket.settimeout(left)
        data = self._socket.recv(262144)
        if not data:
            raise ConnectionError("the broker has closed the connection")
        return data

    def _take_frame(self) -> RawFrame | None:
        self._buffer = self._buffer.lstrip(b"\r\n")
        head, blank, rest = self._buffer.partition(b"\n\n")
        if not blank:
            return None
        command, *lines = head.decode().replace("\r", "").split("\n")
        headers: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            if command != "CONNECTED":
                name, value = unescape(name), unescape(value)
            headers.setdefault(name, value)
        length = int(headers["content-length"]) if "content-length" in headers else rest.find(b"\0")
        if length < 0 or len(rest) <= length:
            return None
        assert rest[length] == 0, "the frame does not end where its content-length says"
        self._buffer = rest[length + 1 :]
        return RawFrame(command, headers, rest[:length])


def encode(command: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
    """One frame's bytes."""
    lines = [command]
    for name, value in headers.items():
        lines.append(f"{name}:{value}" if command == "CONNECT" else f"{escape(name)}:{escape(value)}")
    if body and "content-length" not in headers:
        lines.append(f"content-length:{len(body)}")
    return "\n".join(lines).encode() + b"\n\n" + body + b"\0"


def escape(text: str) -> str:
    """Header escapes of STOMP 1.2, written apart from the broker's own so that each checks the other."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace(":", "\\c")


def unescape(text: str) -> str:
    """The opposite of `escape()`."""
    parts = text.split("\\\\")
    return "\\".join(part.replace("\\n", "\n").replace("\\r", "\r").replace("\\c", ":") for part in parts)
