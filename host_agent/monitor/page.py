"""The monitor's web site: the page, its live stream, what it asks for, metrics."""

from __future__ import annotations

import json
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site

from common.errors import VMwrapperError
from host_agent.metrics import CONTENT_TYPE, Metrics

from .access import Access
from .hosts import HostFeeds
from .stream import Stream

STATIC = Path(__file__).parent / "static"
FILES = {
    b"": ("index.html", "text/html; charset=utf-8"),
    b"monitor.js": ("monitor.js", "text/javascript; charset=utf-8"),
    b"tables.js": ("tables.js", "text/javascript; charset=utf-8"),
    b"plots.js": ("plots.js", "text/javascript; charset=utf-8"),
    b"monitor.css": ("monitor.css", "text/css; charset=utf-8"),
    b"favicon.svg": ("favicon.svg", "image/svg+xml"),
    b"uPlot.js": ("uplot/uPlot.iife.min.js", "text/javascript; charset=utf-8"),
    b"uPlot.css": ("uplot/uPlot.min.css", "text/css; charset=utf-8"),
}
HEADERS = {
    # style-src: uPlot sets styles of its elements, which CSP does not count as inline styles.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}
MOST_REQUEST = 16 * 1024  # bytes of a request that changes something
CONTROL = {"ping": "ping", "signal": "signal", "pause": "pause_vm", "resume": "resume_vm"}
SIGNALS = ("TERM", "KILL", "INT", "STOP", "CONT")
CALL_SECONDS = 60.0


class Monitor(Resource):
    """Everything that is served. `control`: whether the page may change something."""

    isLeaf = True
    _log = Logger()

    def __init__(self, feeds: HostFeeds, stream: Stream, metrics: Metrics, access: Access, control: bool) -> None:
        super().__init__()
        self._feeds = feeds
        self._stream = stream
        self._metrics = metrics
        self._access = access
        self._control = control
        self._files = {path: (STATIC / name).read_bytes() for path, (name, _) in FILES.items()}

    def render(self, request: Any) -> Any:
        for name, value in HEADERS.items():
            request.setHeader(name, value)
        if not self._access.right_host(request):
            return _refuse(request, 421, "This name is not one of the monitor's: open the address that it printed.")
        path = b"/".join(request.postpath or []) if request.postpath else request.path.lstrip(b"/")
        token = request.args.get(b"token", [b""])[0]
        if token and request.method == b"GET" and self._access.right_token(token):
            request.setHeader("Set-Cookie", self._access.cookie_for(request))
            request.setHeader("Location", "/")
            request.setResponseCode(303)
            return b""
        if path == b"metrics" and self._access.login is None:
            return self._render_metrics(request)  # of the loopback, without secrets: Prometheus has no token
        if not self._access.may_look(request):
            if self._access.login is None:
                return _refuse(request, 403, "Open the address with the token that vmctl monitor printed.")
            request.setHeader("WWW-Authenticate", 'Basic realm="VMwrapper monitor", charset="UTF-8"')
            return _refuse(request, 401, "A login is needed.")
        if request.method == b"POST":
            return self._render_control(request, path)
        if request.method not in (b"GET", b"HEAD"):
            return _refuse(request, 405, "Only GET.")
        if path in self._files:
            request.setHeader("Content-Type", FILES[path][1])
            return self._files[path] if request.method == b"GET" else b""
        if path == b"stream":
            return self._stream.render_GET(request)
        if path == b"output":
            return self._answer(request, self._output(request))
        if path == b"metrics":
            return self._render_metrics(request)
        return _refuse(request, 404, "There is no such page.")

    def _render_metrics(self, request: Any) -> bytes:
        request.setHeader("Content-Type", CONTENT_TYPE)
        return self._metrics.text()

    async def _output(self, request: Any) -> Any:
        """The end of a command's output."""
        asked: dict[str, Any] = {"command": _argument(request, b"command")}
        for stream in ("stdout", "stderr"):
            start = _argument(request, f"{stream}_from".encode())
            if start.isdecimal() and len(start) < 16:
                asked[f"{stream}_from"] = int(start)
        return await self._feeds.connection(_argument(request, b"host")).call("output", asked)

    def _render_control(self, request: Any, path: bytes) -> Any:
        if not self._control:
            return _refuse(request, 403, "This monitor only looks: vmctl monitor --control lets it do more.")
        if not self._access.may_change(request):
            return _refuse(request, 403, "This request does not come from the monitor's own page.")
        action = path.decode("ascii", "replace").removeprefix("control/")
        if action not in CONTROL:
            return _refuse(request, 404, "There is no such action.")
        try:
            asked = json.loads(request.content.read(MOST_REQUEST))
            host = asked["host"]
            args = {name: asked[name] for name in ("vm", "command", "signal") if name in asked}
            if not all(isinstance(value, str) for value in (host, *args.values())):
                raise TypeError
            if action == "signal" and args["signal"] not in SIGNALS:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            return _refuse(request, 400, "This is not what the page asks for.")
        self._log.info("the page asked for {action} of {what}", action=action, what=args)
        return self._answer(request, self._do(host, action, args))

    async def _do(self, host: str, action: str, args: dict[str, str]) -> Any:
        return await self._feeds.connection(host).call(CONTROL[action], dict(args), CALL_SECONDS)

    def _answer(self, request: Any, work: Awaitable[Any]) -> Any:
        """Write what comes of it as JSON, unless the browser has left."""
        left: list[object] = []
        request.notifyFinish().addErrback(left.append)

        def done(value: Any, code: int = 200) -> None:
            if left:
                return
            request.setResponseCode(code)
            request.setHeader("Content-Type", "application/json")
            request.write(json.dumps(value).encode())
            request.finish()

        def failed(failure: Any) -> None:
            error = failure.value
            if not isinstance(error, VMwrapperError):
                self._log.failure("a request of the page failed", failure)
            done({"error": str(error)[:500], "hint": getattr(error, "hint", "")}, 502)

        Deferred.fromCoroutine(work).addCallbacks(done, failed)  # type: ignore[arg-type]
        return NOT_DONE_YET


def _argument(request: Any, name: bytes) -> str:
    return str(request.args.get(name, [b""])[0][:200].decode("utf-8", "replace"))


def _refuse(request: Any, code: int, sentence: str) -> bytes:
    request.setResponseCode(code)
    request.setHeader("Content-Type", "text/plain; charset=utf-8")
    return f"{sentence}\n".encode()


class QuietSite(Site):
    """Logs no requests: a token stands in the first one."""

    noisy = False
    displayTracebacks = False

    def log(self, request: Any) -> None:
        """Nothing."""
