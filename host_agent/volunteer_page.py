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
from twisted.web.resource import Resource
from twisted.web.server import Site

from common.errors import ConfigError

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


class _Page(Resource):
    isLeaf = True

    def __init__(self, token: str, observation: Observation) -> None:
        super().__init__()
        self._token = token
        self._observation = observation

    def render_GET(self, request: Any) -> bytes:
        for name, value in HEADERS.items():
            request.setHeader(name, value)
        first, _, rest = request.path.decode("ascii", "replace").lstrip("/").partition("/")
        host = (request.getHeader("host") or "").partition(":")[0]
        if host not in NAMES or not secrets.compare_digest(first.encode(), self._token.encode()):
            request.setResponseCode(404)
            return b"There is no such page.\n"
        if rest == "state":
            request.setHeader("Content-Type", "application/json")
            return json.dumps(self._observation.for_volunteer(MOST_COMMANDS, MOST_EVENTS)).encode()
        if rest not in FILES:
            request.setResponseCode(404)
            return b"There is no such page.\n"
        name, kind = FILES[rest]
        request.setHeader("Content-Type", kind)
        return (STATIC / name).read_bytes()


class _Site(Site):
    noisy = False

    def log(self, request: Any) -> None:
        """Nothing: the address is a secret."""


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
            site = _Site(_Page(token, self._observation), timeout=IDLE_SECONDS)
            try:
                self._port = self._reactor.listenTCP(0, site, interface="127.0.0.1")
            except OSError as error:
                raise ConfigError(f"the page cannot be served: {error}") from None
            address: Any = self._port.getHost()
            self._url = f"http://127.0.0.1:{address.port}/{token}/"
        return {"url": self._url}

    def stop(self) -> Deferred[Any]:
        """Nobody can look any more."""
        port, self._port = self._port, None
        return maybeDeferred(port.stopListening) if port is not None else maybeDeferred(lambda: None)
