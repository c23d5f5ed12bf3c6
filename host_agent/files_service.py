"""The host's file port: plain HTTP on twisted.web, one token for each copy, nothing else to see.

Each request (`files_request.py`) names its copy by `Authorization: Bearer TOKEN`. A token opens one copy, in one
direction, for one guest's connections, until the copy has ended or for `LIFETIME`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

import attrs
from twisted.internet.interfaces import IDelayedCall, IProtocolFactory, IReactorTime

from common import transfer

from .exchange import Exchange
from .files_request import FilesRequest
from .http_server import HttpServer

LIFETIME = 24 * 3600.0  # seconds
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
    source: transfer.Source | None = None  # where the last request about the exchange disk ended
    sink: transfer.Sink | None = None
    failed: str = ""  # why nothing more of it can be taken
    finished: bool = False
    expiry: IDelayedCall | None = None


def new_token() -> str:
    """A token for one copy: 192 random bits."""
    return secrets.token_urlsafe(24)


class FilesService:
    """Holds the open copies and serves them. `factory_for(guest)` serves one guest's connections."""

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
        if copy.source is not None:
            copy.source.close()
        if copy.sink is not None and not copy.finished:
            copy.sink.discard()
            copy.sink = None
        elif not copy.inwards and not copy.finished:
            transfer.discard_part(copy.path, copy.copy_id)  # that an earlier host agent received

    def find(self, token: str, guest: str) -> OpenCopy | None:
        copy = self._copies.get(token)
        return copy if copy is not None and copy.guest == guest else None

    def factory_for(self, guest: str, exchange: Exchange | None = None) -> IProtocolFactory:
        """A server for the connections of one guest."""
        return HttpServer(lambda channel: FilesRequest(channel, self.find, guest, exchange), TIMEOUT)
