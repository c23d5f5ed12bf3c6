"""The volunteer's page: what the VMs of this one host are doing, as the task's graphics in the BOINC client.

Served by the host agent itself, when its owner asks for it: on the loopback, at an address that nobody can guess, and
only to look at.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IListeningPort
from twisted.web.http import NOT_ALLOWED, NOT_FOUND, Request

from common.errors import ConfigError

from .http_server import HttpServer
from .observe import Observation

STATIC = Path(__file__).parent / "monitor" / "static"
FILES = {
    "": ("volunteer.html", "text/html; charset=utf-8"),
    "volunteer.js": ("volunteer.js", "text/javascript; charset=utf-8"),
    "volunteer.css": ("volunteer.css", "text/css; charset=utf-8"),
    "favicon.svg": ("favicon.svg", "image/svg+xml"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
MOST_COMMANDS = 20
MOST_EVENTS = 20
IDLE_SECONDS = 60
NAMES = ("localhost", "127.0.0.1")
PLAIN = "text/plain; charset=utf-8"


class _Request(Request):
    """One request for the page, or for a part of it."""

    def __init__(self, channel: Any, token: str, observation: Observation) -> None:
        super().__init__(channel)
        self._token = token
        self._observation = observation

    def process(self) -> None:
        for name, value in HEADERS.items():
            self.setHeader(name, value)
        code, kind, body = self._found()
        self.setResponseCode(code)
        self.setHeader("Content-Type", kind)
        self.setHeader("Content-Length", str(len(body)))
        self.write(body)  # of HEAD, only the headers go out
        self.finish()

    def _found(self) -> tuple[int, str, bytes]:
        first, _, rest = self.path.decode("ascii", "replace").lstrip("/").partition("/")
        host = (self.getHeader("host") or "").partition(":")[0]
        if self.method not in (b"GET", b"HEAD"):
            return NOT_ALLOWED, PLAIN, b"This page is only to look at.\n"
        known = host in NAMES and secrets.compare_digest(first.encode(), self._token.encode())
        if known and rest == "state":
            state = self._observation.for_volunteer(MOST_COMMANDS, MOST_EVENTS)
            return 200, "application/json", json.dumps(state).encode()
        if known and rest in FILES:
            name, kind = FILES[rest]
            return 200, kind, (STATIC / name).read_bytes()
        return NOT_FOUND, PLAIN, b"There is no such page.\n"


class VolunteerPage:
    """Opened when somebody first asks for its address."""

    def __init__(self, reactor: Any, observation: Observation) -> None:
        self._reactor = reactor
        self._observation = observation
        self._port: IListeningPort | None = None
        self._url = ""

    def open(self, args: dict[str, Any], update: object) -> dict[str, Any]:
        """The call `open_page`."""
        if self._port is None:
            token = secrets.token_urlsafe(24)
            server = HttpServer(lambda channel: _Request(channel, token, self._observation), IDLE_SECONDS)
            try:
                self._port = self._reactor.listenTCP(0, server, interface="127.0.0.1")
            except OSError as error:
                raise ConfigError(f"the page cannot be served: {error}") from None
            address: Any = self._port.getHost()
            self._url = f"http://127.0.0.1:{address.port}/{token}/"
        return {"url": self._url}

    def stop(self) -> Deferred[Any]:
        """Nobody can look any more."""
        port, self._port = self._port, None
        return maybeDeferred(port.stopListening) if port is not None else maybeDeferred(lambda: None)
