"""One request to the host's file port: what it asks of its copy, and the answer.

    GET  /manifest    what the copy holds (host → guest)
    GET  /data        its bytes and the digests after them; `Range: bytes=N-` to go on
    PUT  /manifest    what the guest is going to send; answers {"offset": bytes that are here already}
    PUT  /data        all bytes from there on, `Content-Range: bytes N-LAST/ALL`; answers {"offset": …}
    POST /done        the digest: checked, and the files are put in their place; 409 to a host that knows no manifest

With `Digest: sha-512` in its requests, a guest says that it compares that; the answers about manifests say so, too, and
`Exchange: SIZE` where the guest has an exchange disk (`exchange.py`). Then bytes may lie there, each such request about
some that come together, `Exchange: PLACE`:

    GET  /data        `Range: bytes=N-LAST`: they are put there; answers the digest of all up to LAST
    PUT  /data        without a body: they are taken from there

The bytes that a guest sends are hashed and written as they come, and count as soon as they are here: after a break it
asks with its manifest where to go on. Bytes that cannot be taken break their connection; the next request is told why.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IPushProducer
from twisted.internet.task import cooperate
from twisted.internet.threads import deferToThread
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http import BAD_REQUEST, CONFLICT, NOT_FOUND, Request
from zope.interface import implementer

from common import transfer
from common.checksum import BOTH, SHA256, SHA512
from common.errors import TransferError, VMwrapperError

from .exchange import SIZE, Exchange

if TYPE_CHECKING:
    from .files_service import OpenCopy

PIECE = 256 * 1024  # bytes that one turn of the reactor reads and sends, and between two words on progress
UNPROCESSABLE = 422  # the answer is a sentence that tells why

Find = Callable[[str, str], "OpenCopy | None"]  # the open copy of a token and a guest
Answer = Deferred[Any] | bytes | None  # the body, at once or later; None: it is sent otherwise


class FilesRequest(Request):
    """One request; its path and method say what is asked of a copy."""

    _log = Logger()
    _copy: OpenCopy | None = None
    _sink: transfer.Sink | None = None  # that takes the body as it comes
    _received = 0
    _told = 0  # bytes, by the last word on progress
    _broken = False

    def __init__(self, channel: Any, find: Find, guest: str, exchange: Exchange | None) -> None:
        super().__init__(channel)
        self._find, self._guest, self._exchange = find, guest, exchange

    # -- while the body comes

    def gotLength(self, length: int | None) -> None:
        self.content = io.BytesIO()  # `handleContentChunk` bounds it; a file on the disk would be twice the work
        scheme, _, token = (self.getHeader(b"authorization") or b"").decode("ascii", "replace").partition(" ")
        if scheme == "Bearer":
            self._copy = self._find(token, self._guest)
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
        handlers: dict[tuple[bytes, bytes, bool], Callable[[OpenCopy], Answer]] = {
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
        else:
            self._answer(answer)

    def _answer(self, body: bytes | None) -> None:
        if body is not None and not self._disconnected and not self.finished and not self._broken:
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

    # -- what both ends can do

    def _ways(self) -> tuple[str, ...]:
        """Of checksums, which are made here."""
        return BOTH if self.getHeader(b"digest") == SHA512.encode("ascii") else (SHA256,)

    def _say_what_we_can(self) -> None:
        self.setHeader(b"digest", self._ways()[0].encode("ascii"))
        if self._exchange is not None and self._exchange.exists():
            self.setHeader(b"exchange", str(SIZE).encode("ascii"))

    def _exchange_at(self) -> tuple[Exchange, int] | None:
        """The disk and the place on it, of a request whose bytes lie there."""
        place = self.getHeader(b"exchange")
        if place is None:
            return None
        if self._exchange is None or not place.isdigit():
            raise TransferError("this guest has no exchange disk with such a place")
        return self._exchange, int(place)

    # -- host → guest

    def _get_manifest(self, copy: OpenCopy) -> Deferred[bytes]:
        self._say_what_we_can()

        def found(manifest: transfer.Manifest) -> bytes:
            copy.manifest = manifest
            return manifest.to_json()

        return deferToThread(transfer.scan, copy.path).addCallback(found)

    def _get_data(self, copy: OpenCopy) -> Answer:
        if copy.manifest is not None:
            return self._send_data(copy, copy.manifest)

        # The guest has the manifest from a host agent that is no more.
        def found(manifest: transfer.Manifest) -> Answer:
            copy.manifest = manifest
            return self._send_data(copy, manifest)

        return deferToThread(transfer.scan, copy.path).addCallback(found)

    def _send_data(self, copy: OpenCopy, manifest: transfer.Manifest) -> Answer:
        start, end = _range(self.getHeader(b"range"), manifest.total)
        exchange = self._exchange_at()
        if exchange is None and end != manifest.total:
            raise VMwrapperError("only ranges of the form bytes=N- come in the answer")
        source = self._source_at(copy, manifest, start)
        if exchange is not None:
            return source.addCallback(lambda source: self._lay_out(copy, source, end, *exchange))
        source.addCallbacks(lambda source: self._stream(copy, source), self._failed)
        return None

    def _source_at(self, copy: OpenCopy, manifest: transfer.Manifest, start: int) -> Deferred[transfer.Source]:
        kept, copy.source = copy.source, None
        if kept is not None and (kept.offset, kept.ways) == (start, self._ways()):
            return succeed(kept)
        if kept is not None:
            kept.close()
        source = transfer.Source(copy.path, manifest, self._ways())
        if not start:
            return succeed(source)
        # What lies before `start` is read again for the digest: in a thread, it may be much.
        return deferToThread(source.skip_to, start).addCallback(lambda _: source)

    def _stream(self, copy: OpenCopy, source: transfer.Source) -> None:
        start = source.offset
        if start:
            self.setResponseCode(206)
            self.setHeader(b"content-range", f"bytes {start}-{source.length - 1}/{source.length}".encode("ascii"))
        self.setHeader(b"content-length", str(source.length - start).encode("ascii"))
        _Streamer(self, source, copy)

    def _lay_out(
        self, copy: OpenCopy, source: transfer.Source, end: int, exchange: Exchange, place: int
    ) -> Deferred[bytes]:
        def pieces() -> Iterator[None]:
            away = place - source.offset
            while source.offset < end and not self._disconnected:
                at = source.offset + away
                exchange.put(at, source.read(min(PIECE, end - source.offset)))
                copy.progress(source.offset, source.manifest.total)
                yield

        def done(_: object) -> bytes:
            copy.source = source
            return source.digest().encode("ascii")

        return cooperate(pieces()).whenDone().addCallback(done)

    # -- guest → host

    def _put_manifest(self, copy: OpenCopy) -> Deferred[bytes]:
        manifest = transfer.Manifest.from_json(self._body())
        self._say_what_we_can()
        if copy.sink is not None:
            copy.sink.close()
            copy.sink = None  # what still comes over an earlier connection is not taken

        def prepared(sink: transfer.Sink) -> bytes:
            if copy.sink is not None:
                copy.sink.close()
            copy.sink = sink
            return _offset(sink)

        return deferToThread(transfer.Sink, copy.path, manifest, copy.copy_id, self._ways()).addCallback(prepared)

    def _put_data(self, copy: OpenCopy) -> Deferred[bytes] | bytes | None:
        sink = self._sink
        if sink is None:
            self._refuse(BAD_REQUEST, "Content-Range has to say which bytes these are")
            return None
        exchange = self._exchange_at()
        return self._collect(sink, *exchange) if exchange is not None else _offset(sink)

    def _collect(self, sink: transfer.Sink, exchange: Exchange, place: int) -> Deferred[bytes]:
        end = _last(self.getHeader(b"content-range") or b"") + 1

        def pieces() -> Iterator[None]:
            away = place - sink.offset
            while sink.offset < end and not self._broken and not self._disconnected:
                self._take(exchange.take(sink.offset + away, min(PIECE, end - sink.offset)), sink)
                yield

        return cooperate(pieces()).whenDone().addCallback(lambda _: _offset(sink))

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
                self._copy.progress(self._source.offset, self._source.manifest.total)
            else:
                self._request.write(self._source.digests().encode("ascii"))
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


def _range(header: bytes | None, total: int) -> tuple[int, int]:
    """Where what is asked for begins and ends."""
    if header is None:
        return 0, total
    unit, _, interval = header.partition(b"=")
    start, dash, last = interval.partition(b"-")
    if unit.strip() != b"bytes" or dash != b"-" or not start.isdigit() or not (last or b"0").isdigit():
        raise VMwrapperError("only ranges of the form bytes=N- and bytes=N-LAST are served")
    begin, end = int(start), int(last) + 1 if last else total
    if not begin <= end <= total:
        raise VMwrapperError(f"the copy has {total} bytes, and not those from {begin} to {end}")
    return begin, end


def _last(content_range: bytes) -> int:
    last = content_range.partition(b"/")[0].rpartition(b"-")[2]
    if not last.isdigit():
        raise VMwrapperError("Content-Range has to say which bytes these are")
    return int(last)
