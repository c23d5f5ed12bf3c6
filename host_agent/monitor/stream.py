"""The page's live view: server-sent events, the same bytes for everybody who looks.

A browser that does not keep up gets no piles of old changes: it is left out until it has read what it was sent, and
then gets everything anew.
"""

from __future__ import annotations

import json
from typing import Any

from twisted.internet.interfaces import IPushProducer
from twisted.internet.task import LoopingCall
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET
from zope.interface import implementer

from .model import Model
from .series import STEP

TICK = 0.25  # seconds between two messages to the page
QUIET = 15.0  # seconds without news after which a comment keeps the connection open
MOST_WATCHERS = 32


def encode(kind: str, value: Any) -> bytes:
    """One server-sent event. JSON has no line ends of its own."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), json.dumps(value, separators=(",", ":")).encode())


@implementer(IPushProducer)
class _Watcher:
    """One browser. The transport pauses us while the browser does not read."""

    def __init__(self, request: Any) -> None:
        self.request = request
        self.reads = True
        self.behind = False

    def pauseProducing(self) -> None:
        self.reads = False

    def resumeProducing(self) -> None:
        self.reads = True

    def stopProducing(self) -> None:
        self.reads = False


class Stream(Resource):
    """GET: the state, and from then on what changes."""

    isLeaf = True

    def __init__(self, reactor: Any, model: Model, hello: dict[str, Any]) -> None:
        """`hello`: what the page must know besides."""
        super().__init__()
        self._reactor = reactor
        self._model = model
        self._hello = hello
        self._watchers: set[_Watcher] = set()
        self._quiet = 0.0
        self._last_step = reactor.seconds()
        self._ticking = LoopingCall(self._tick)
        self._ticking.clock = reactor
        self._stepping = LoopingCall(self._step)
        self._stepping.clock = reactor

    def start(self) -> None:
        self._ticking.start(TICK, now=False)
        self._stepping.start(STEP, now=False)

    def stop(self) -> None:
        for call in (self._ticking, self._stepping):
            if call.running:
                call.stop()
        for watcher in list(self._watchers):
            watcher.request.unregisterProducer()
            watcher.request.finish()
        self._watchers.clear()

    def render_GET(self, request: Any) -> Any:
        if len(self._watchers) >= MOST_WATCHERS:
            request.setResponseCode(503)
            return b"too many browsers look at this page already; close some\n"
        request.setHeader("Content-Type", "text/event-stream")
        watcher = _Watcher(request)
        request.registerProducer(watcher, True)
        self._watchers.add(watcher)

        # With the connection, its producer is gone, too.
        request.notifyFinish().addBoth(lambda _: self._watchers.discard(watcher))
        request.write(encode("state", {**self._hello, **self._model.snapshot()}))
        return NOT_DONE_YET

    def _tick(self) -> None:
        change = self._model.changes()
        self._quiet += TICK
        data = b""
        if change:
            data = encode("change", {**change, "now": self._model.clock()})
        elif self._quiet >= QUIET:
            data = b": still here\n\n"
        if data:
            self._quiet = 0.0
        self._send(data)

    def _step(self) -> None:
        now = self._reactor.seconds()
        self._model.look()
        point = self._model.series.step(self._model.clock(), max(0.1, now - self._last_step), self._model.depth)
        self._last_step = now
        self._send(encode("point", point))

    def _send(self, data: bytes) -> None:
        state = b""
        for watcher in list(self._watchers):
            if not watcher.reads:
                watcher.behind = True
            elif watcher.behind:
                state = state or encode("state", {**self._hello, **self._model.snapshot()})
                watcher.behind = False
                watcher.request.write(state)
            elif data:
                watcher.request.write(data)
