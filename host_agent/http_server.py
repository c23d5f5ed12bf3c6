"""HTTP by twisted.web, without its server of pages, which costs a process three megabytes of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.web.http import HTTPFactory, Request


class HttpServer(HTTPFactory):
    """`make` makes the request of a connection's channel; its `process` answers."""

    noisy = False

    def __init__(self, make: Callable[[Any], Request], timeout: float) -> None:
        """`timeout`: seconds that a connection may be silent."""
        super().__init__(timeout=timeout)
        self._make = make

    def startFactory(self) -> None:
        """No log is kept; twisted's has a timer for the time of its lines, each second and for every VM's server."""

    def buildProtocol(self, addr: Any) -> Any:
        channel = super().buildProtocol(addr)
        assert channel is not None
        channel.requestFactory = lambda channel, queued=None: self._make(channel)
        return channel

    def log(self, request: Any) -> None:
        """Nothing: addresses here are secrets."""
