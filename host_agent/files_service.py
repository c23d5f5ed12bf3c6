"""The host's file port: plain HTTP on twisted.web, one token for each copy, nothing else to see.

    GET  /TOKEN/manifest            what the copy holds (host → guest)
    GET  /TOKEN/data                its bytes and the digest after them; `Range: bytes=N-` to go on
    PUT  /TOKEN/manifest            what the guest is going to send; answers {"offset": bytes that are here already}
    PUT  /TOKEN/data?offset=N       the next block, at most 4 MiB; answers {"offset": …}; 409 when N is not next
    POST /TOKEN/done                the digest: checked, and the files are put in their place

A token opens one copy, in one direction, for one guest's connections, until the copy has ended or for `LIFETIME`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from pathlib import Path

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IProtocolFactory, IPushProducer, IReactorTime
from twisted.internet.threads import deferToThread
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http import CONFLICT, NOT_FOUND, REQUEST_ENTITY_TOO_LARGE
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request, Site
from zope.interface import implementer

from common import transfer
from common.errors import VMwrapperError

LIFETIME = 24 * 3600.0  # seconds
BLOCK = 4 * 1024 * 1024  # largest body of a PUT of data
PIECE = 256 * 1024  # bytes that one turn of the reactor reads and sends

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
        site = Site(_Root(self, guest), requestFactory=_BoundedRequest, timeout=120)
        site.noisy = False
        return site


class _BoundedRequest(Request):
    """Breaks off a body that is larger than anything we asked for."""

    _received = 0

    def handleContentChunk(self, data: bytes) -> None:
        self._received += len(data)
        if self._received > max(BLOCK, transfer.MAX_MANIFEST):
            self.loseConnection()
        else:
            super().handleContentChunk(data)


class _Root(Resource):
    def __init__(self, service: FilesService, guest: str) -> None:
        super().__init__()
        self._service, self._guest = service, guest

    def getChild(self, path: bytes, request: Request) -> Resource:
        copy = self._service.find(path.decode("ascii", "replace"), self._guest)
        return _CopyResource(copy) if copy is not None else _Refusal(NOT_FOUND, "no such copy, or its time is over")


class _Refusal(Resource):
    isLeaf = True

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__()
        self._code, self._sentence = code, sentence

    def render(self, request: Request) -> bytes:
        return _refuse(request, self._code, self._sentence)


def _refuse(request: Request, code: int, sentence: str) -> bytes:
    request.setResponseCode(code)
    request.setHeader(b"content-type", b"text/plain; charset=utf-8")
    return sentence.encode("utf-8")


class _CopyResource(Resource):
    """One copy; the last part of the path and the method say what is asked."""

    isLeaf = True
    _log = Logger()

    def __init__(self, copy: OpenCopy) -> None:
        super().__init__()
        self._copy = copy

    def render(self, request: Request) -> bytes | int:
        what = b"/".join(request.postpath or []).decode("ascii", "replace")
        method = request.method.decode("ascii", "replace")
        handlers: dict[tuple[str, str, bool], Callable[[Request], Deferred[bytes] | bytes | int]] = {
            ("GET", "manifest", True): self._get_manifest,
            ("GET", "data", True): self._get_data,
            ("PUT", "manifest", False): self._put_manifest,
            ("PUT", "data", False): self._put_data,
            ("POST", "done", False): self._done,
        }
        handler = handlers.get((method, what, self._copy.inwards))
        if handler is None or self._copy.finished:
            return _refuse(request, NOT_FOUND, "this copy has nothing of that kind")
        try:
            answer = handler(request)
        except VMwrapperError as error:
            return _refuse(request, 422, str(error))
        if isinstance(answer, Deferred):
            answer.addCallbacks(self._answer, self._failed, callbackArgs=(request,), errbackArgs=(request,))
            return NOT_DONE_YET
        return answer

    def _answer(self, body: bytes, request: Request) -> None:
        if not request._disconnected:
            request.setHeader(b"content-length", str(len(body)).encode("ascii"))
            request.write(body)
            request.finish()

    def _failed(self, failure: Failure, request: Request) -> None:
        if not failure.check(VMwrapperError):
            self._log.failure("a copy failed", failure)
        if not request._disconnected:
            request.write(_refuse(request, 422, str(failure.value)))
            request.finish()

    # -- host → guest

    def _get_manifest(self, request: Request) -> Deferred[bytes]:
        def found(manifest: transfer.Manifest) -> bytes:
            self._copy.manifest = manifest
            return manifest.to_json()

        return deferToThread(transfer.scan, self._copy.path).addCallback(found)

    def _get_data(self, request: Request) -> int:
        if self._copy.manifest is not None:
            return self._send_data(request, self._copy.manifest)

        # The guest has the manifest from a host agent that is no more.
        def found(manifest: transfer.Manifest) -> None:
            self._copy.manifest = manifest
            self._send_data(request, manifest)

        scanned = deferToThread(transfer.scan, self._copy.path).addCallback(found)
        scanned.addErrback(self._failed, request)
        return NOT_DONE_YET

    def _send_data(self, request: Request, manifest: transfer.Manifest) -> int:
        start = _range_start(request.getHeader(b"range"))
        source = transfer.Source(self._copy.path, manifest)
        if start > manifest.total:
            raise VMwrapperError(f"the copy has {manifest.total} bytes, and none at {start}")
        if start:
            request.setResponseCode(206)
            request.setHeader(b"content-range", f"bytes {start}-{source.length - 1}/{source.length}".encode("ascii"))
        request.setHeader(b"content-length", str(source.length - start).encode("ascii"))
        # What lies before `start` is read again for the digest: in a thread, it may be much.
        skipped = deferToThread(source.skip_to, start) if start else None
        if skipped is None:
            _Streamer(request, source, self._copy)
        else:
            skipped.addCallbacks(lambda _: _Streamer(request, source, self._copy), self._failed, errbackArgs=(request,))
        return NOT_DONE_YET

    # -- guest → host

    def _put_manifest(self, request: Request) -> Deferred[bytes]:
        manifest = transfer.Manifest.from_json(_body(request))
        copy = self._copy

        def prepare() -> transfer.Sink:
            if copy.sink is not None:
                copy.sink.close()
            return transfer.Sink(copy.path, manifest, copy.copy_id)

        def prepared(sink: transfer.Sink) -> bytes:
            copy.sink = sink
            return _offset(sink)

        return deferToThread(prepare).addCallback(prepared)

    def _put_data(self, request: Request) -> bytes:
        sink = self._copy.sink
        if sink is None:
            return _refuse(request, CONFLICT, json.dumps({"offset": 0}))
        if request.args is None or request.args.get(b"offset", [b""])[0] != str(sink.offset).encode("ascii"):
            return _refuse(request, CONFLICT, _offset(sink).decode("ascii"))
        body = _body(request)
        if len(body) > BLOCK:
            return _refuse(request, REQUEST_ENTITY_TOO_LARGE, f"a block has at most {BLOCK} bytes")
        sink.write(body)
        self._copy.progress(sink.offset, sink.total)
        return _offset(sink)

    def _done(self, request: Request) -> Deferred[bytes] | bytes:
        sink = self._copy.sink
        if sink is None:
            return _refuse(request, CONFLICT, json.dumps({"offset": 0}))
        digest = _body(request).decode("ascii", "replace")

        def placed(sha256: str) -> bytes:
            self._copy.finished = True
            return sha256.encode("ascii")

        return deferToThread(sink.finish, digest).addCallback(placed)


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


def _body(request: Request) -> bytes:
    assert request.content is not None
    data: bytes = request.content.read()
    return data


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
