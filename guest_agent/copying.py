"""The guest's end of a copy: a small HTTP client in a thread, because every step of it blocks on a disk or a socket.

Both directions go on where they stopped after a break, and give up when nothing moved for `PATIENCE` seconds.
A repeat of a known copy is answered with its result, or waits for the one that is under way.
"""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from twisted.logger import Logger

from common import transfer
from common.errors import ConfigError, TransferError, VMwrapperError
from common.files import confine
from common.link import Link
from common.messages import ENDED, RUNNING, Copied, CopyIn, CopyOut, fields_of

from .blocks import Blocks
from .journal import Journal

if TYPE_CHECKING:
    from concurrent.futures import Future
    from http.client import HTTPConnection, HTTPResponse

PATIENCE = 120.0  # seconds without a byte
TIMEOUT = 30.0  # seconds for one read or write on the socket
READ = 1024 * 1024
AHEAD = 2  # buffers of that size
WAKE = 64 * 1024  # bytes that are worth waking up for
IN_FLIGHT = 256 * 1024  # bytes that the system takes before the host has them; less than what `Blocks` keeps
AT_ONCE = 4  # copies; more wait
MOST_HELD = 512  # under way, waiting, or not yet confirmed


class Copier:
    """Does the host's copies below `home`, over the host's file port at `base_url`."""

    _log = Logger()

    def __init__(self, reactor: Any, home: Path, base_url: str, journal: Journal, link: Link) -> None:
        self._reactor = reactor
        self._journal = journal
        self._home = home
        url = urlsplit(base_url)
        self._address = (url.hostname or "", url.port or 80)
        self._link = link
        self._copies: dict[str, Copied | None] = {  # None: under way
            copy: Copied(copy, **result) for copy, result in journal.copies.items()
        }
        self._turns = threading.BoundedSemaphore(AT_ONCE)
        self._clients: set[_Client] = set()  # of the copies that move now

    def copy_in(self, message: CopyIn) -> None:
        self._begin(message.command, lambda: self._fetch(message))

    def copy_out(self, message: CopyOut) -> None:
        self._begin(message.command, lambda: self._send(message))

    def confirm(self, copies: Sequence[str]) -> None:
        """The host has the results."""
        for copy in copies:
            if self._copies.get(copy) is not None:
                del self._copies[copy]

    def restored(self) -> None:
        """No connection leads anywhere any more: the copies make theirs anew at once."""
        for client in list(self._clients):
            client.interrupt()

    def held(self) -> dict[str, str]:
        """What HELLO says of the copies."""
        return {copy: RUNNING if result is None else ENDED for copy, result in self._copies.items()}

    def _begin(self, command: str, work: Callable[[], Copied]) -> None:
        if command in self._copies:
            result = self._copies[command]
            if result is not None:
                self._link.send(result)
            return
        if len(self._copies) >= MOST_HELD:
            self._link.send(Copied(command, reason=f"the guest has {MOST_HELD} copies to do already"))
            return
        self._copies[command] = None
        # A thread of its own, not the reactor's pool: a copy may take hours, and must not keep an agent from ending.
        threading.Thread(target=self._work, args=(command, work), name=f"copy-{command}", daemon=True).start()

    def _work(self, command: str, work: Callable[[], Copied]) -> None:
        with self._turns:
            try:
                result = work()
            except VMwrapperError as error:
                result = Copied(command, reason=str(error))
            except Exception as error:
                result = Copied(command, reason=f"the copy failed in the guest: {error!r}"[:2000])
        self._reactor.callFromThread(self._done, result)

    def _done(self, result: Copied) -> None:
        self._copies[result.command] = result
        try:
            fields = fields_of(result, but="command")
            self._journal.copied(result.command, fields)
        except OSError as error:
            self._log.warn("the end of copy {id} is not in the journal: {error}", id=result.command, error=error)
        self._link.send(result)

    # -- in the thread

    def _fetch(self, message: CopyIn) -> Copied:
        destination = self._confine(message.destination)
        with self._client(message.token) as client:
            manifest = transfer.Manifest.from_json(client.get_manifest())
            sink = transfer.Sink(destination, manifest, message.command, direct=True)
            try:
                sha256 = sink.finish(client.download(sink))
            finally:
                sink.close()
        return Copied(message.command, files=manifest.files, bytes=manifest.total, sha256=sha256)

    def _send(self, message: CopyOut) -> Copied:
        source_path = self._confine(message.source)
        if not source_path.exists():
            raise TransferError(f"there is no {message.source} in the guest")
        manifest = transfer.scan(source_path)
        with self._client(message.token) as client:
            sha256 = client.upload(source_path, manifest)
        return Copied(message.command, files=manifest.files, bytes=manifest.total, sha256=sha256)

    @contextlib.contextmanager
    def _client(self, token: str) -> Iterator[_Client]:
        client = _Client(self._address, token)
        self._clients.add(client)
        try:
            yield client
        finally:
            self._clients.discard(client)
            client.close()

    def _confine(self, path: str) -> Path:
        try:
            return confine(self._home, path)
        except ConfigError as error:
            raise TransferError(str(error)) from None


class _Client:
    """Talks to the host's file port about one copy. Repeats what a broken connection interrupted."""

    def __init__(self, address: tuple[str, int], token: str) -> None:
        # Imported late: most guests start long before their first copy.
        from http.client import HTTPException

        self._errors = (OSError, HTTPException)
        self._address = address
        self._headers = {"Authorization": f"Bearer {token}"}
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
        return self._answer(method)

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

    def get_manifest(self) -> bytes:
        found: list[bytes] = []

        def step() -> bool:
            found.append(self._ask("GET", "/manifest").read(transfer.MAX_MANIFEST + 1))
            return True

        self._patiently(step)
        return found[-1]

    def download(self, sink: transfer.Sink) -> str:
        """Bring the sink the rest of its bytes; returns the digest that follows them.

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
            response = self._ask("GET", "/data", start=sink.offset)
            assert self._connection is not None
            stream = _Stream(response, self._connection.sock)
            with ThreadPoolExecutor(1) as writer:
                receive(stream, writer)
            tail = bytearray(transfer.DIGEST_LENGTH)
            if stream.fill(memoryview(tail), last=True) < len(tail):
                raise ConnectionError("the stream ended early")
            digest.append(tail.decode("ascii", "replace"))
            return True

        self._patiently(step)
        self.close()  # the response was not read through the connection's own buffer
        return digest[-1]

    def upload(self, path: Path, manifest: transfer.Manifest) -> str:
        """Send the host what it lacks; returns the digest."""
        blocks = Blocks(path, manifest, READ)
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

        def step() -> bool:
            offset = where()
            if offset < manifest.total and self._put_rest(blocks, offset, manifest.total) != manifest.total:
                raise ConnectionError("the host has not taken all of it")
            return not blocks.at(manifest.total)

        def finish() -> bool:
            response = self._ask("POST", "/done", blocks.digest().encode("ascii"))
            response.read()
            if response.status == HTTPStatus.CONFLICT:  # another host agent, which has what is on its disk
                step()
                return False
            return True

        try:
            self._patiently(step)
            self._patiently(finish)
            return blocks.digest()
        finally:
            blocks.close()

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
