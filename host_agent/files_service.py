"""The host's file port: plain HTTP on twisted.web, one token for each copy, nothing else to see.

    GET  /TOKEN/manifest            what the copy holds (host → guest)
    GET  /TOKEN/data                its bytes and the digest after them; `Range: bytes=N-` to go on
    PUT  /TOKEN/manifest            what the guest is going to send; answers {"offset": bytes that are here already}
    PUT  /TOKEN/data?offset=N       the next block, at most 4 MiB; answers {"offset": …}; 409 when N is not next
    POST /TOKEN/done                the digest: checked, and the files are put in their place

A token opens one copy, in one direction, for one guest's connections, until the copy has ended or for `LIFETIME`.
"""

from __future__ import annotations

import io
import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IProtocolFactory, IPushProducer, IReactorTime
from twisted.internet.threads import deferToThread
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http import CONFLICT, NOT_FOUND, REQUEST_ENTITY_TOO_LARGE, Request
from zope.interface import implementer

from common import transfer
from common.errors import VMwrapperError

from .http_server import HttpServer

LIFETIME = 24 * 3600.0  # seconds
BLOCK = 4 * 1024 * 1024  # largest body of a PUT of data
PIECE = 256 * 1024  # bytes that one turn of the reactor reads and sends
TIMEOUT = 120.0  # seconds without a byte on a connection

Progress = Callable[[int, int], None]  # bytes so far, bytes in all


@attrs.define(eq=False)
class OpenCopy:
    """One copy that a guest may do now."""

    token: str
    copy_id: str
    guest: str
    path: Path  # what is sent, or where it goes
    inwards: bool  # from the host into the guest
    progress: Progress = attrs.field(repr=False)
    manifest: transfer.Manifest | None = None
    sink: transfer.Sink | None = None
    finished: bool = False
    expiry: IDelayedCall | None = None


def new_token() -> str:
    """A token for one copy: 192 random bits."""
    return secrets.token_urlsafe(24)


class FilesService:
    """Holds the open copies and serves them. `factory_for(guest)` serves one guest's connections."""

    _log = Logger()

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._copies: dict[str, OpenCopy] = {}

    def open_copy(
        self, token: str, copy_id: str, guest: str, path: Path, *, inwards: bool, progress: Progress
    ) -> OpenCopy:
        """Let `guest` do one copy; the token is what it needs to know."""
        copy = OpenCopy(token, copy_id, guest, path, inwards, progress)
        self._copies[copy.token] = copy
        copy.expiry = self._clock.callLater(LIFETIME, self.close_copy, copy)
        return copy

    def close_copy(self, copy: OpenCopy) -> None:
        """The token opens nothing any more; what was received without being finished is dropped."""
        if self._copies.pop(copy.token, None) is None:
            return
        if copy.expiry is not None and copy.expiry.active():
            copy.expiry.cancel()
        if copy.sink is not None and not copy.finished:
            copy.sink.discard()
        elif not copy.inwards and not copy.finished:
            transfer.discard_part(copy.path, copy.copy_id)  # that an earlier host agent received

    def find(self, token: str, guest: str) -> OpenCopy | None:
        copy = self._copies.get(token)
        return copy if copy is not None and copy.guest == guest else None

    def factory_for(self, guest: str) -> IProtocolFactory:
        """A server for the connections of one guest."""
        return HttpServer(lambda channel: _Request(channel, self, guest), TIMEOUT)


class _Request(Request):
    """One request; the last part of the path and the method say what is asked of a copy."""

    _log = Logger()
    _copy: OpenCopy
    _received = 0

    def __init__(self, channel: Any, service: FilesService, guest: str) -> None:
        super().__init__(channel)
        self._service, self._guest = service, guest

    def gotLength(self, length: int | None) -> None:
        self.content = io.BytesIO()  # `handleContentChunk` bounds it; a file on the disk would be twice the work

    def handleContentChunk(self, data: bytes) -> None:
        """Breaks off a body that is larger than anything we asked for."""
        self._received += len(data)
        if self._received > max(BLOCK, transfer.MAX_MANIFEST):
            self.loseConnection()
        else:
            super().handleContentChunk(data)

    def process(self) -> None:
        token, _, what = self.path[1:].decode("ascii", "replace").partition("/")
        copy = self._service.find(token, self._guest)
        if copy is None:
            self._refuse(NOT_FOUND, "no such copy, or its time is over")
            return
        self._copy = copy
        handlers: dict[tuple[str, str, bool], Callable[[], Deferred[bytes] | bytes | None]] = {
            ("GET", "manifest", True): self._get_manifest,
            ("GET", "data", True): self._get_data,
            ("PUT", "manifest", False): self._put_manifest,
            ("PUT", "data", False): self._put_data,
            ("POST", "done", False): self._done,
        }
        handler = handlers.get((self.method.decode("ascii", "replace"), what, copy.inwards))
        if handler is None or copy.finished:
            self._refuse(NOT_FOUND, "this copy has nothing of that kind")
            return
        try:
            answer = handler()
        except Exception:
            self._failed(Failure())
            return
        if isinstance(answer, Deferred):
            answer.addCallbacks(self._answer, self._failed)
        elif answer is not None:
            self._answer(answer)

    def _answer(self, body: bytes) -> None:
        if not self._disconnected and not self.finished:
            self.setHeader(b"content-length", str(len(body)).encode("ascii"))
            self.write(body)
            self.finish()

    def _refuse(self, code: int, sentence: str) -> None:
        self.setResponseCode(code)
        self.setHeader(b"content-type", b"text/plain; charset=utf-8")
        self._answer(sentence.encode("utf-8"))

    def _failed(self, failure: Failure) -> None:
        if not failure.check(VMwrapperError):
            self._log.failure("a copy failed", failure)
        self._refuse(422, str(failure.value))

    # -- host → guest

    def _get_manifest(self) -> Deferred[bytes]:
        def found(manifest: transfer.Manifest) -> bytes:
            self._copy.manifest = manifest
            return manifest.to_json()

        return deferToThread(transfer.scan, self._copy.path).addCallback(found)

    def _get_data(self) -> None:
        if self._copy.manifest is not None:
            self._send_data(self._copy.manifest)
            return

        # The guest has the manifest from a host agent that is no more.
        def found(manifest: transfer.Manifest) -> None:
            self._copy.manifest = manifest
            self._send_data(manifest)

        deferToThread(transfer.scan, self._copy.path).addCallback(found).addErrback(self._failed)

    def _send_data(self, manifest: transfer.Manifest) -> None:
        start = _range_start(self.getHeader(b"range"))
        source = transfer.Source(self._copy.path, manifest)
        if start > manifest.total:
            raise VMwrapperError(f"the copy has {manifest.total} bytes, and none at {start}")
        if start:
            self.setResponseCode(206)
            self.setHeader(b"content-range", f"bytes {start}-{source.length - 1}/{source.length}".encode("ascii"))
        self.setHeader(b"content-length", str(source.length - start).encode("ascii"))
        if not start:
            _Streamer(self, source, self._copy)
            return
        # What lies before `start` is read again for the digest: in a thread, it may be much.
        skipped = deferToThread(source.skip_to, start)
        skipped.addCallbacks(lambda _: _Streamer(self, source, self._copy), self._failed)

    # -- guest → host

    def _put_manifest(self) -> Deferred[bytes]:
        manifest = transfer.Manifest.from_json(self._body())
        copy = self._copy

        def prepare() -> transfer.Sink:
            if copy.sink is not None:
                copy.sink.close()
            return transfer.Sink(copy.path, manifest, copy.copy_id)

        def prepared(sink: transfer.Sink) -> bytes:
            copy.sink = sink
            return _offset(sink)

        return deferToThread(prepare).addCallback(prepared)

    def _put_data(self) -> bytes | None:
        sink = self._copy.sink
        if sink is None:
            self._not_next(0)
            return None
        if self.args is None or self.args.get(b"offset", [b""])[0] != str(sink.offset).encode("ascii"):
            self._not_next(sink.offset)
            return None
        body = self._body()
        if len(body) > BLOCK:
            self._refuse(REQUEST_ENTITY_TOO_LARGE, f"a block has at most {BLOCK} bytes")
            return None
        sink.write(body)
        self._copy.progress(sink.offset, sink.total)
        return _offset(sink)

    def _not_next(self, offset: int) -> None:
        self._refuse(CONFLICT, json.dumps({"offset": offset}))

    def _done(self) -> Deferred[bytes] | None:
        sink = self._copy.sink
        if sink is None:
            self._not_next(0)
            return None
        digest = self._body().decode("ascii", "replace")

        def placed(sha256: str) -> bytes:
            self._copy.finished = True
            return sha256.encode("ascii")

        return deferToThread(sink.finish, digest).addCallback(placed)

    def _body(self) -> bytes:
        assert self.content is not None
        data: bytes = self.content.read()
        return data


@implementer(IPushProducer)
class _Streamer:
    """Feeds one response: a piece a turn, so that others have theirs, and never more than the socket takes."""

    def __init__(self, request: Request, source: transfer.Source, copy: OpenCopy) -> None:
        self._request, self._source, self._copy = request, source, copy
        self._paused = False
        self._ended = False
        request.notifyFinish().addBoth(self._finished)
        request.registerProducer(self, True)
        self.resumeProducing()

    def resumeProducing(self) -> None:
        self._paused = False
        while not self._paused and not self._ended:
            try:
                data = self._source.read(PIECE)
            except (OSError, VMwrapperError):
                # The promised length cannot be kept: breaking off is the only honest answer.
                self._request.loseConnection()
                self._ended = True
                return
            if data:
                self._request.write(data)
                self._copy.progress(self._source.offset, self._source.length - transfer.DIGEST_LENGTH)
            else:
                self._request.write(self._source.digest().encode("ascii"))
                self._ended = True
                self._request.unregisterProducer()
                self._request.finish()

    def pauseProducing(self) -> None:
        self._paused = True

    def stopProducing(self) -> None:
        self._ended = True

    def _finished(self, _: object) -> None:
        self._ended = True
        self._source.close()


def _offset(sink: transfer.Sink) -> bytes:
    return json.dumps({"offset": sink.offset}).encode("ascii")


def _range_start(header: bytes | None) -> int:
    if header is None:
        return 0
    unit, _, interval = header.partition(b"=")
    start, dash, end = interval.partition(b"-")
    if unit.strip() != b"bytes" or dash != b"-" or end or not start.isdigit():
        raise VMwrapperError("only ranges of the form bytes=N- are served")
    return int(start)
