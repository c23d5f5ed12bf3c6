"""The host's file port: plain HTTP on twisted.web, one token for each copy, nothing else to see.

    GET  /manifest    what the copy holds (host → guest)
    GET  /data        its bytes and the digest after them; `Range: bytes=N-` to go on
    PUT  /manifest    what the guest is going to send; answers {"offset": bytes that are here already}
    PUT  /data        all bytes from there on, `Content-Range: bytes N-LAST/ALL`; answers {"offset": …}
    POST /done        the digest: checked, and the files are put in their place; 409 to a host that knows no manifest

Each request names its copy by `Authorization: Bearer TOKEN`. A token opens one copy, in one direction, for one guest's
connections, until the copy has ended or for `LIFETIME`. The bytes that a guest sends are hashed and written as they
come, and count as soon as they are here: after a break it asks with its manifest where to go on. Bytes that cannot be
taken break their connection; the next request is told why.
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
from twisted.web.http import BAD_REQUEST, CONFLICT, NOT_FOUND, Request
from zope.interface import implementer

from common import transfer
from common.errors import VMwrapperError

from .http_server import HttpServer

LIFETIME = 24 * 3600.0  # seconds
PIECE = 256 * 1024  # bytes that one turn of the reactor reads and sends, and between two words on progress
UNPROCESSABLE = 422  # the answer is a sentence that tells why
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
    failed: str = ""  # why nothing more of it can be taken
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
            copy.sink = None
        elif not copy.inwards and not copy.finished:
            transfer.discard_part(copy.path, copy.copy_id)  # that an earlier host agent received

    def find(self, token: str, guest: str) -> OpenCopy | None:
        copy = self._copies.get(token)
        return copy if copy is not None and copy.guest == guest else None

    def factory_for(self, guest: str) -> IProtocolFactory:
        """A server for the connections of one guest."""
        return HttpServer(lambda channel: _Request(channel, self, guest), TIMEOUT)


class _Request(Request):
    """One request; its path and method say what is asked of a copy."""

    _log = Logger()
    _copy: OpenCopy | None = None
    _sink: transfer.Sink | None = None  # that takes the body as it comes
    _received = 0
    _told = 0  # bytes, by the last word on progress
    _broken = False

    def __init__(self, channel: Any, service: FilesService, guest: str) -> None:
        super().__init__(channel)
        self._service, self._guest = service, guest

    # -- while the body comes

    def gotLength(self, length: int | None) -> None:
        self.content = io.BytesIO()  # `handleContentChunk` bounds it; a file on the disk would be twice the work
        scheme, _, token = (self.getHeader(b"authorization") or b"").decode("ascii", "replace").partition(" ")
        if scheme == "Bearer":
            self._copy = self._service.find(token, self._guest)
        part = self.getHeader(b"content-range")
        if part is None:
            return
        sink = self._copy.sink if self._copy is not None else None
        if sink is not None and part.startswith(b"bytes %d-" % sink.offset):
            self._sink, self._told = sink, sink.offset
        else:
            self._break()

    def handleContentChunk(self, data: bytes) -> None:
        if self._broken:
            return
        if self._sink is not None:
            self._take(data, self._sink)
            return
        self._received += len(data)
        if self._received > transfer.MAX_MANIFEST:
            self._break()  # larger than anything that we asked for
        else:
            super().handleContentChunk(data)

    def _take(self, data: bytes, sink: transfer.Sink) -> None:
        copy = self._copy
        assert copy is not None
        if copy.sink is not sink:
            self._break()  # the copy has ended, or goes on over another connection
            return
        try:
            sink.write(data)
        except VMwrapperError as error:
            copy.failed = str(error)
            self._break()
            return
        if sink.offset - self._told >= PIECE or sink.offset == sink.total:
            self._told = sink.offset
            copy.progress(sink.offset, sink.total)

    def _break(self) -> None:
        self._broken = True
        self.loseConnection()

    # -- when all of it is here

    def process(self) -> None:
        if self._broken:
            return
        copy = self._copy
        if copy is None:
            self._refuse(NOT_FOUND, "no such copy, or its time is over")
            return
        if copy.failed:
            self._refuse(UNPROCESSABLE, copy.failed)
            return
        handlers: dict[tuple[bytes, bytes, bool], Callable[[OpenCopy], Deferred[bytes] | bytes | None]] = {
            (b"GET", b"/manifest", True): self._get_manifest,
            (b"GET", b"/data", True): self._get_data,
            (b"PUT", b"/manifest", False): self._put_manifest,
            (b"PUT", b"/data", False): self._put_data,
            (b"POST", b"/done", False): self._done,
        }
        handler = handlers.get((self.method, self.path, copy.inwards))
        if handler is None or copy.finished:
            self._refuse(NOT_FOUND, "this copy has nothing of that kind")
            return
        try:
            answer = handler(copy)
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
        self._refuse(UNPROCESSABLE, str(failure.value))

    # -- host → guest

    def _get_manifest(self, copy: OpenCopy) -> Deferred[bytes]:
        def found(manifest: transfer.Manifest) -> bytes:
            copy.manifest = manifest
            return manifest.to_json()

        return deferToThread(transfer.scan, copy.path).addCallback(found)

    def _get_data(self, copy: OpenCopy) -> None:
        if copy.manifest is not None:
            self._send_data(copy, copy.manifest)
            return

        # The guest has the manifest from a host agent that is no more.
        def found(manifest: transfer.Manifest) -> None:
            copy.manifest = manifest
            self._send_data(copy, manifest)

        deferToThread(transfer.scan, copy.path).addCallback(found).addErrback(self._failed)

    def _send_data(self, copy: OpenCopy, manifest: transfer.Manifest) -> None:
        start = _range_start(self.getHeader(b"range"))
        source = transfer.Source(copy.path, manifest)
        if start > manifest.total:
            raise VMwrapperError(f"the copy has {manifest.total} bytes, and none at {start}")
        if start:
            self.setResponseCode(206)
            self.setHeader(b"content-range", f"bytes {start}-{source.length - 1}/{source.length}".encode("ascii"))
        self.setHeader(b"content-length", str(source.length - start).encode("ascii"))
        if not start:
            _Streamer(self, source, copy)
            return
        # What lies before `start` is read again for the digest: in a thread, it may be much.
        skipped = deferToThread(source.skip_to, start)
        skipped.addCallbacks(lambda _: _Streamer(self, source, copy), self._failed)

    # -- guest → host

    def _put_manifest(self, copy: OpenCopy) -> Deferred[bytes]:
        manifest = transfer.Manifest.from_json(self._body())
        if copy.sink is not None:
            copy.sink.close()
            copy.sink = None  # what still comes over an earlier connection is not taken

        def prepared(sink: transfer.Sink) -> bytes:
            if copy.sink is not None:
                copy.sink.close()
            copy.sink = sink
            return _offset(sink)

        return deferToThread(transfer.Sink, copy.path, manifest, copy.copy_id).addCallback(prepared)

    def _put_data(self, copy: OpenCopy) -> bytes | None:
        if self._sink is None:
            self._refuse(BAD_REQUEST, "Content-Range has to say which bytes these are")
            return None
        return _offset(self._sink)

    def _done(self, copy: OpenCopy) -> Deferred[bytes] | None:
        if copy.sink is None:
            self._refuse(CONFLICT, "this host agent knows no manifest of it")
            return None

        def placed(sha256: str) -> bytes:
            copy.finished = True
            return sha256.encode("ascii")

        return deferToThread(copy.sink.finish, self._body().decode("ascii", "replace")).addCallback(placed)

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
