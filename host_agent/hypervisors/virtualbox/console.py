"""A guest's serial console: VirtualBox listens on a socket, on Windows on a named pipe; its bytes go to a bounded file.

VirtualBox can write a file itself, but one without an end.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet.interfaces import IAddress, IDelayedCall
from twisted.internet.protocol import ClientFactory, Protocol, connectionDone
from twisted.python.failure import Failure

KEEP = 128 * 1024  # bytes that stay when the file is cut
LIMIT = 2 * KEEP
TRY_TICK = 0.03  # seconds between two tries to connect
TRIES = 6000
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x09\x0b-\x1f\x7f]")


class BoundedFile:
    """Takes bytes for ever and holds the last ones, between `KEEP` and `LIMIT` of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = path.stat().st_size if path.exists() else 0

    def write(self, data: bytes) -> None:
        if self._size + len(data) > LIMIT:
            self._replace((self.tail(KEEP) + data)[-KEEP:])
            return
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(handle, "ab") as file:
            file.write(data)
        self._size += len(data)

    def _replace(self, data: bytes) -> None:
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        self._size = len(data)

    def tail(self, size: int) -> bytes:
        """The last bytes, at most `size`."""
        try:
            with self._path.open("rb") as file:
                file.seek(max(0, self._path.stat().st_size - size))
                return file.read()
        except OSError:
            return b""


class Console:
    """One guest's console."""

    def __init__(self, reactor: Any, place: str, file: Path) -> None:
        self._reactor = reactor
        self._place = place
        self._file = BoundedFile(file)
        self._connection: _Reader | None = None
        self._tries = 0
        self._next_try: IDelayedCall | None = None
        self._pipe: PipeReader | None = None

    def connect(self) -> None:
        """Read from the socket until the machine ends.

        VirtualBox opens it while it starts the machine and does not keep what nobody reads: so it is tried often,
        for a guest's first words are those that explain why it does not start.
        """
        self.close()
        if sys.platform == "win32":
            self._pipe = PipeReader(self._reactor, self._place, self.received)
            return
        self._tries = TRIES
        self._try()

    def _try(self) -> None:
        self._next_try = None
        self._reactor.connectUNIX(self._place, _Factory(self), timeout=5)

    def failed(self) -> None:
        """Nobody listens there yet."""
        self._tries -= 1
        if self._tries > 0:
            self._next_try = self._reactor.callLater(TRY_TICK, self._try)

    def received(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError:
            pass  # the disk is full: the machine's own trouble will be told, its console need not be

    def connected(self, connection: _Reader | None) -> None:
        self._connection = connection
        if connection is not None and self._tries <= 0:
            self.close()  # it was closed while it was being opened

    def close(self) -> None:
        self._tries = 0
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._next_try is not None:
            self._next_try.cancel()
            self._next_try = None
        if self._connection is not None and self._connection.transport is not None:
            self._connection.transport.loseConnection()

    def tail(self, lines: int) -> str:
        """The last lines that have something printable on them."""
        text = _ESCAPES.sub("", self._file.tail(KEEP).decode("utf-8", "replace").replace("\r\n", "\n"))
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:]) if lines > 0 else ""


def console_place(directory: Path, instance: str) -> str:
    """Where VirtualBox is to listen: in the VM's private directory, or where Windows has all its pipes."""
    return rf"\\.\pipe\vmwrapper-{instance}" if sys.platform == "win32" else str(directory / "console.sock")


class PipeReader:
    """Reads a named pipe in a thread of its own, which tries to open it as often as there is hope."""

    def __init__(self, reactor: Any, place: str, received: Callable[[bytes], None]) -> None:
        self._reactor = reactor
        self._place = place
        self._received = received
        self._closed = threading.Event()
        threading.Thread(target=self._read, name="console", daemon=True).start()

    def _read(self) -> None:
        for _ in range(TRIES):
            if self._closed.wait(TRY_TICK):
                return
            try:
                pipe = open(self._place, "rb", buffering=0)  # noqa: PTH123, SIM115 - no path, but a name
            except OSError:
                continue  # nobody listens there yet
            with pipe:
                while (data := pipe.read(4096)) and not self._closed.is_set():
                    self._reactor.callFromThread(self._heard, data)
            return

    def _heard(self, data: bytes) -> None:
        if not self._closed.is_set():
            self._received(data)

    def close(self) -> None:
        """A thread that waits for more ends with the machine."""
        self._closed.set()


class _Reader(Protocol):
    def __init__(self, console: Console) -> None:
        self._console = console

    def connectionMade(self) -> None:
        self._console.connected(self)

    def dataReceived(self, data: bytes) -> None:
        self._console.received(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._console.connected(None)


class _Factory(ClientFactory):
    noisy = False

    def __init__(self, console: Console) -> None:
        self._console = console

    def buildProtocol(self, addr: IAddress | None) -> _Reader:
        return _Reader(self._console)

    def clientConnectionFailed(self, connector: object, reason: Failure) -> None:
        self._console.failed()
