"""The host's file port: a small HTTP client of it, for one copy, that waits at every step.

Both directions go on where they stopped after a break, and give up when nothing moved for `PATIENCE` seconds. The bytes
go over the exchange disk where both ends have one, and what is wrong with it; the rest over the connection.
"""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import os
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from twisted.logger import Logger

from common import transfer
from common.checksum import DIGITS, SHA256, SHA512
from common.errors import TransferError

from .blocks import Blocks
from .emulated import is_emulated
from .exchange import Exchange, ExchangeError

if TYPE_CHECKING:
    from concurrent.futures import Future
    from http.client import HTTPConnection, HTTPResponse

PATIENCE = 120.0  # seconds without a byte
TIMEOUT = 30.0  # seconds for one read or write on the socket
READ = 1024 * 1024
AHEAD = 2  # buffers of that size
WAKE = 64 * 1024  # bytes that are worth waking up for
IN_FLIGHT = 256 * 1024  # bytes that the system takes before the host has them; less than what `Blocks` keeps


class FilePort:
    """Talks to the host's file port about one copy. Repeats what a broken connection interrupted."""

    _log = Logger()

    def __init__(self, address: tuple[str, int], token: str, exchange: Exchange | None = None) -> None:
        # Imported late: most guests start long before their first copy.
        from http.client import HTTPException

        self._errors = (OSError, HTTPException)
        self._address = address
        self._headers = {"Authorization": f"Bearer {token}"}
        if is_emulated():
            self._headers["Digest"] = SHA512
        self.way = SHA256  # of the checksum that both ends compare
        self._exchange = exchange
        self._connection: HTTPConnection | None = None
        self._moved = time.monotonic()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def interrupt(self) -> None:
        """Called in the reactor's thread: whatever waits for the connection finds it broken."""
        connection = self._connection
        sock = connection.sock if connection is not None else None
        if sock is not None:
            with contextlib.suppress(OSError):  # closed at this moment by its own thread
                sock.shutdown(socket.SHUT_RDWR)

    def _connected(self) -> HTTPConnection:
        from http.client import HTTPConnection

        if self._connection is None:
            self._connection = HTTPConnection(*self._address, timeout=TIMEOUT)
        return self._connection

    def _ask(self, method: str, what: str, body: bytes | None = None, start: int = 0) -> HTTPResponse:
        headers = self._headers | ({"Range": f"bytes={start}-"} if start else {})
        self._connected().request(method, what, body=body, headers=headers)
        response = self._answer(method)
        if what == "/manifest":
            self.way = response.getheader("Digest", SHA256)
            if self._exchange is not None and response.getheader("Exchange") != str(self._exchange.size):
                self._exchange = None  # it is not the host's
        return response

    def _answer(self, method: str) -> HTTPResponse:
        response = self._connected().getresponse()
        if response.status not in ((200, 409) if method != "GET" else (200, 206)):
            text = response.read(2000).decode("utf-8", "replace").strip()
            raise TransferError(text or f"the host's file port answered {response.status}")
        return response

    def _patiently(self, step: Callable[[], bool]) -> None:
        """Do `step` until it says it is done; a broken connection is made anew while bytes still move."""
        wait = 0.2
        self._moved = time.monotonic()
        while True:
            before = self._moved
            try:
                if step():
                    return
            except self._errors as error:
                self.close()
                if time.monotonic() - self._moved > PATIENCE:
                    raise TransferError(f"the host's file port cannot be reached: {error!r}") from None
                wait = 0.2 if self._moved > before else min(wait * 1.5, 10.0)
                time.sleep(wait)

    def get_manifest(self) -> transfer.Manifest:
        found: list[bytes] = []

        def step() -> bool:
            found.append(self._ask("GET", "/manifest").read(transfer.MAX_MANIFEST + 1))
            return True

        self._patiently(step)
        return transfer.Manifest.from_json(found[-1])

    def download(self, sink: transfer.Sink) -> tuple[str, str]:
        """Bring the sink the rest of its bytes; returns the digest to compare and the SHA-256, which follow them.

        While one buffer is filled, the other is hashed and written in a second thread.
        """
        from concurrent.futures import ThreadPoolExecutor

        buffers = deque(memoryview(mmap.mmap(-1, READ)) for _ in range(AHEAD))  # aligned to pages
        digest: list[str] = []

        def receive(stream: _Stream, writer: ThreadPoolExecutor) -> None:
            left = sink.total - sink.offset
            written: deque[Future[None]] = deque()
            try:
                while left:
                    if len(written) == AHEAD:
                        written.popleft().result()
                    count = stream.fill(buffers[0][: min(READ, left)], last=left <= READ)
                    left -= count
                    self._moved = time.monotonic()
                    written.append(writer.submit(sink.write, buffers[0][:count]))
                    buffers.rotate(-1)
            finally:
                for future in written:  # what was received counts, also when the connection breaks
                    future.result()

        def step() -> bool:
            if exchange := self._exchange_for(sink.total - sink.offset):
                with self._without_exchange_if_it_fails():
                    self._download_by(exchange, sink)
            response = self._ask("GET", "/data", start=sink.offset)
            assert self._connection is not None
            stream = _Stream(response, self._connection.sock)
            with ThreadPoolExecutor(1) as writer:
                receive(stream, writer)
            tail = bytearray(DIGITS[SHA256] if self.way == SHA256 else DIGITS[self.way] + DIGITS[SHA256])
            if stream.fill(memoryview(tail), last=True) < len(tail):
                raise ConnectionError("the stream ended early")
            digest.append(tail.decode("ascii", "replace"))
            return True

        self._patiently(step)
        self.close()  # the response was not read through the connection's own buffer
        return digest[-1][: DIGITS[self.way]], digest[-1][-DIGITS[SHA256] :]

    @contextlib.contextmanager
    def _without_exchange_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except ExchangeError as error:
            self._log.warn("a copy goes on without the exchange disk: {error}", error=error)
            self._exchange = None
            self.close()  # it may have answers to come

    def _exchange_for(self, left: int) -> Exchange | None:
        """The disk, if it is worth the requests for what is left of a copy."""
        return self._exchange if self._exchange is not None and left >= self._exchange.half else None

    def _download_by(self, exchange: Exchange, sink: transfer.Sink) -> None:
        """While the host puts bytes on one half of the disk, we take those on the other."""

        def ask(start: int, place: int) -> int:
            end = min(start + exchange.half, sink.total)
            where = {"Range": f"bytes={start}-{end - 1}", "Exchange": str(place)}
            self._connected().request("GET", "/data", headers=self._headers | where)
            return end

        place = 0
        end = ask(sink.offset, place)
        while sink.offset < sink.total:
            digest = self._exchanged().decode("ascii", "replace")
            here, count, place = place, end - sink.offset, exchange.half - place
            if end < sink.total:
                end = ask(end, place)
            # This machine may have been restored since the answer, and then something else lies there.
            if not sink.write_if(digest, exchange.read(here, count)):
                raise ExchangeError("what is on it is not what the host put there")
            self._moved = time.monotonic()

    def _exchanged(self) -> bytes:
        """The host's answer to a request whose bytes are on the disk."""
        response = self._connected().getresponse()
        body = response.read()
        if response.status != HTTPStatus.OK:
            raise ExchangeError(body.decode("utf-8", "replace")[:500])
        return body

    def upload(self, path: Path, manifest: transfer.Manifest) -> str:
        """Send the host what it lacks; returns the SHA-256."""
        listing = manifest.to_json()
        position, since = -1, 0.0  # where the host wanted to go on, and since when it did

        def where() -> int:
            nonlocal position, since
            offset = _offset_of(self._ask("PUT", "/manifest", listing))
            if offset != position:
                position, since = offset, time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                raise TransferError(f"the host's file port takes nothing after the first {offset} bytes")
            return offset

        first: list[int] = []

        def begin() -> bool:
            first.append(where())
            return True

        self._patiently(begin)  # and now it is known what both ends can do
        exchange = self._exchange_for(manifest.total)
        blocks = Blocks(path, manifest, exchange.half if exchange is not None else READ, (self.way,))
        sha256 = ""

        def step() -> bool:
            offset = first.pop() if first else where()
            exchange = self._exchange_for(manifest.total - offset)
            if exchange is not None:
                with self._without_exchange_if_it_fails():
                    self._upload_by(exchange, blocks, offset, manifest.total)
                return False  # the host says how far it came
            if offset < manifest.total and self._put_rest(blocks, offset, manifest.total) != manifest.total:
                raise ConnectionError("the host has not taken all of it")
            return not blocks.at(manifest.total)

        def finish() -> bool:
            nonlocal sha256
            response = self._ask("POST", "/done", blocks.digest().encode("ascii"))
            sha256 = response.read(DIGITS[SHA256]).decode("ascii", "replace")
            if response.status == HTTPStatus.CONFLICT:  # another host agent, which has what is on its disk
                while not step():
                    pass
                return False
            return True

        try:
            self._patiently(step)
            self._patiently(finish)
            return sha256
        finally:
            blocks.close()

    def _upload_by(self, exchange: Exchange, blocks: Blocks, offset: int, total: int) -> None:
        """While the host takes the block on one half of the disk, we put the next on the other."""
        place, waiting = 0, False
        while offset < total:
            block = blocks.at(offset)
            exchange.write(place, block)
            if waiting:
                self._exchanged()
            end = offset + len(block)
            where = {"Content-Range": f"bytes {offset}-{end - 1}/{total}", "Exchange": str(place)}
            self._connected().request("PUT", "/data", body=b"", headers=self._headers | where)
            offset, place, waiting = end, exchange.half - place, True
            self._moved = time.monotonic()
        self._exchanged()

    def _put_rest(self, blocks: Blocks, offset: int, total: int) -> int:
        """Everything from `offset` on, in one request; how much the host then has."""
        connection = self._connected()
        connection.putrequest("PUT", "/data", skip_accept_encoding=True)
        headers = {"Content-Range": f"bytes {offset}-{total - 1}/{total}", "Content-Length": str(total - offset)}
        for name, value in (self._headers | headers).items():
            connection.putheader(name, value)
        connection.endheaders()
        _wait_in_the_kernel(connection.sock)
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, IN_FLIGHT)
        while block := blocks.at(offset):
            connection.sock.sendall(block)
            offset += len(block)
            self._moved = time.monotonic()
        return _offset_of(self._answer("PUT"))


def _offset_of(response: HTTPResponse) -> int:
    return int(json.loads(response.read(1000))["offset"])


def _wait_in_the_kernel(sock: socket.socket) -> None:
    """One system call for each buffer, not two for each packet: with Python's own timeout a socket does not block."""
    if os.name == "nt":  # which has these options under other meanings, or not
        sock.settimeout(TIMEOUT)
        return
    sock.settimeout(None)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(TIMEOUT), 0))


class _Stream:
    """The body of a response, straight from the socket."""

    def __init__(self, response: HTTPResponse, sock: socket.socket) -> None:
        # All that came with the headers, and lies in the response's buffer now.
        self._head = memoryview(response.read1(io.DEFAULT_BUFFER_SIZE))
        self._socket = sock
        self._wait_all = 0 if os.name == "nt" else socket.MSG_WAITALL
        _wait_in_the_kernel(sock)

    def fill(self, view: memoryview, last: bool) -> int:
        """Receive until `view` is full, or what comes before a break; `last` when nothing is to follow soon."""
        filled = min(len(view), len(self._head))
        view[:filled] = self._head[:filled]
        self._head = self._head[filled:]
        if self._wait_all:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1 if last else WAKE)
        try:
            while filled < len(view):
                count = self._socket.recv_into(view[filled:], 0, self._wait_all)
                if not count:
                    raise ConnectionError("the stream ended early")
                filled += count
        except OSError:
            if not filled:
                raise
        return filled
