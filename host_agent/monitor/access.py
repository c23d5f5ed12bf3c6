"""Who may look: on the loopback whoever knows the token of this run, elsewhere whoever knows the login, over TLS.

A page of another site can make a browser send requests here, and a name that its owner lets point to 127.0.0.1 can even
make it read the answers. So the Host header must be one of ours, and what changes something must come from our own
page: same origin, JSON, and a header with the key that only our own page can have read.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
from collections.abc import Sequence
from typing import Any

import attrs

COOKIE = "vmwrapper-monitor"
KEY_HEADER = "X-VMwrapper-Key"


@attrs.frozen
class Login:
    """What a browser asks its user for."""

    name: str
    password: str = attrs.field(repr=False)


@attrs.define
class Access:
    """Decides about each request. With a `login` it is asked for; without one, the `token` opens the page."""

    hosts: Sequence[str]  # names under which the page is reached
    login: Login | None = None
    token: str = attrs.field(factory=lambda: secrets.token_urlsafe(24), repr=False)
    key: str = attrs.field(factory=lambda: secrets.token_urlsafe(24), repr=False)

    def right_host(self, request: Any) -> bool:
        """Whether the browser thinks that it talks to us."""
        name: str = (request.getHeader("host") or "").lower()
        if name.rpartition(":")[2].isdigit():
            name = name.rpartition(":")[0]
        return "*" in self.hosts or name.strip("[]") in self.hosts

    def may_look(self, request: Any) -> bool:
        if self.login is not None:
            return self._right_login(request)
        cookie: bytes = request.getCookie(f"{COOKIE}-{_port(request)}".encode()) or b""
        return hmac.compare_digest(cookie, self.token.encode())

    def right_token(self, token: bytes) -> bool:
        """Whether this token opens the page, and may become a cookie."""
        return self.login is None and hmac.compare_digest(token, self.token.encode())

    def _right_login(self, request: Any) -> bool:
        assert self.login is not None
        kind, _, value = (request.getHeader("authorization") or "").partition(" ")
        if kind.lower() != "basic":
            return False
        try:
            given = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            return False
        return hmac.compare_digest(given, f"{self.login.name}:{self.login.password}".encode())

    def may_change(self, request: Any) -> bool:
        """Whether a request that changes something comes from our own page."""
        origin = request.getHeader("origin")
        host = request.getHeader("host") or ""
        scheme = "https" if request.isSecure() else "http"
        return (
            origin == f"{scheme}://{host}"
            and request.getHeader("sec-fetch-site") in (None, "same-origin")
            and (request.getHeader("content-type") or "").partition(";")[0] == "application/json"
            and hmac.compare_digest((request.getHeader(KEY_HEADER) or "").encode(), self.key.encode())
        )

    def cookie_for(self, request: Any) -> str:
        """The Set-Cookie header for a browser that has the token."""
        return f"{COOKIE}-{_port(request)}={self.token}; Path=/; HttpOnly; SameSite=Strict"


def _port(request: Any) -> int:
    """Cookies know no ports: the name says whose it is."""
    port: int = getattr(request.getHost(), "port", 0)
    return port
