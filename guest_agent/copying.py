"""The guest's end of a copy: in a thread, because every step of it blocks on a disk or a socket (`file_port.py`).

A repeat of a known copy is answered with its result, or waits for the one that is under way.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from twisted.logger import Logger

from common import transfer
from common.errors import ConfigError, TransferError, VMwrapperError
from common.files import confine
from common.link import Link
from common.messages import ENDED, RUNNING, Copied, CopyIn, CopyOut, fields_of

from .exchange import Exchange, find
from .file_port import FilePort
from .journal import Journal

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
        self._ports: set[FilePort] = set()  # of the copies that move now
        self._exchange = threading.Lock()  # held by the copy that uses the disk

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
        for port in list(self._ports):
            port.interrupt()

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
        with self._port(message.token) as port:
            manifest = port.get_manifest()
            sink = transfer.Sink(destination, manifest, message.command, (port.way,), direct=True)
            try:
                digest, sha256 = port.download(sink)
                sink.finish(digest)
            finally:
                sink.close()
        return Copied(message.command, files=manifest.files, bytes=manifest.total, sha256=sha256)

    def _send(self, message: CopyOut) -> Copied:
        source_path = self._confine(message.source)
        if not source_path.exists():
            raise TransferError(f"there is no {message.source} in the guest")
        manifest = transfer.scan(source_path)
        with self._port(message.token) as port:
            sha256 = port.upload(source_path, manifest)
        return Copied(message.command, files=manifest.files, bytes=manifest.total, sha256=sha256)

    @contextlib.contextmanager
    def _port(self, token: str) -> Iterator[FilePort]:
        with contextlib.ExitStack() as stack:
            port = FilePort(self._address, token, self._open_exchange(stack))
            self._ports.add(port)
            stack.callback(port.close)
            stack.callback(self._ports.discard, port)
            yield port

    def _open_exchange(self, stack: contextlib.ExitStack) -> Exchange | None:
        """For one copy, until it ends; None where there is no such disk, or another copy has it."""
        device = find()
        if device is None or not self._exchange.acquire(blocking=False):
            return None
        stack.callback(self._exchange.release)
        try:
            exchange = Exchange(device)
        except OSError as error:
            self._log.warn("copies go without {device}: {error}", device=device, error=error)
            return None
        stack.callback(exchange.close)
        return exchange

    def _confine(self, path: str) -> Path:
        try:
            return confine(self._home, path)
        except ConfigError as error:
            raise TransferError(str(error)) from None
