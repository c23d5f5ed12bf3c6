"""Copies of files between this host and its guests. A copy may be done twice, so its recovery is simple: ask again.

The bytes go over the host's file port (`files_service.py`); here is what was asked for, and how it ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from common.errors import ConfigError, TransferError
from common.messages import Copied, CopyIn, CopyOut, fields_of

from .commands import KEEP_ENDED, Update
from .commits import Commits
from .events import Happened
from .files_service import FilesService, OpenCopy, new_token
from .guests import Guest
from .outbox import Outbox, Record
from .reconcile import Action, HostView

UNDONE = "undone"  # a code of `docs/control.md`, and how such a reason begins


class UndoneError(TransferError):
    """A copy of a time that a restore of the guest has undone."""

    code = UNDONE


@attrs.define(eq=False)
class Copy:
    """One copy, inwards (host to guest) or outwards."""

    id: str
    guest: Guest | None
    record: Record = attrs.field(repr=False)
    opened: OpenCopy | None = attrs.field(default=None, repr=False)
    noted: bool = True  # it is on the disk that it was asked for, so its guest may be asked
    result: Copied | None = None
    done_bytes: int = 0
    total_bytes: int = 0
    ended_at: float | None = None  # seconds since 1970
    watchers: list[Update] = attrs.field(factory=list, repr=False)
    waiters: list[Deferred[Copied]] = attrs.field(factory=list, repr=False)

    @property
    def message(self) -> CopyIn | CopyOut:
        """What the guest is asked."""
        request = self.record.request
        kind = CopyIn if request["inwards"] else CopyOut
        return kind(self.id, request["token"], request["guest_path"])

    @property
    def about(self) -> dict[str, Any]:
        """What the log says with each event of this copy."""
        name = self.guest.name if self.guest is not None else self.record.guest
        direction = "in" if self.record.request["inwards"] else "out"
        return {"vm": name, "instance": self.record.guest, "copy": self.id, "direction": direction}

    def wait(self) -> Deferred[Copied]:
        """Fires with what was copied, or fails with TransferError."""
        waiter: Deferred[Copied] = Deferred()
        if self.result is None:
            self.waiters.append(waiter)
        else:
            _answer(waiter, self.result)
        return waiter


def _answer(waiter: Deferred[Copied], result: Copied) -> None:
    if result.reason.startswith(f"{UNDONE}:"):
        waiter.errback(UndoneError(result.reason))
    elif result.reason:
        waiter.errback(TransferError(result.reason))
    else:
        waiter.callback(result)


class Copies:
    """All copies, by id."""

    _log = Logger()

    def __init__(self, files: FilesService, outbox: Outbox, commits: Commits) -> None:
        self._files = files
        self._outbox = outbox
        self._commits = commits
        self._copies: dict[str, Copy] = {}

    def load(self, find_guest: Callable[[str], Guest | None]) -> None:
        """Take up what an earlier host agent had asked for."""
        for record in [each for each in self._outbox.records.values() if each.is_copy]:
            copy = self._rebuild(record, find_guest(record.guest))
            if copy.guest is None and copy.result is None:
                self._end(copy, Copied(copy.id, reason="its VM was gone when the host agent came back"))

    def _rebuild(self, record: Record, guest: Guest | None) -> Copy:
        copy = self._copies[record.id] = Copy(record.id, guest, record)
        if record.result is not None:
            copy.result = Copied(**record.result)
        elif guest is not None:
            self._open(copy)
        return copy

    def _open(self, copy: Copy) -> None:
        request = copy.record.request

        def progress(done: int, total: int) -> None:
            copy.done_bytes, copy.total_bytes = done, total
            for watcher in list(copy.watchers):
                watcher("progress", {"bytes": done, "total": total})

        copy.opened = self._files.open_copy(
            request["token"],
            copy.id,
            copy.record.guest,
            Path(request["host"]),
            inwards=request["inwards"],
            progress=progress,
        )

    def _close(self, copy: Copy) -> None:
        if copy.opened is not None:
            self._files.close_copy(copy.opened)
            copy.opened = None

    def __iter__(self) -> Iterator[Copy]:
        return iter(list(self._copies.values()))

    def get(self, copy_id: str) -> Copy | None:
        return self._copies.get(copy_id)

    def of(self, guest: Guest) -> list[Copy]:
        """The guest's copies that have not ended."""
        return [c for c in self._copies.values() if c.guest is guest and c.result is None]

    def put(self, guest: Guest, copy_id: str, source: Path, destination: str) -> Copy:
        """Copy a file or directory of this host into the guest."""
        if not source.exists():
            raise TransferError(f"there is no {source}")
        return self._copy(guest, copy_id, source, destination, inwards=True)

    def fetch(self, guest: Guest, copy_id: str, source: str, destination: Path) -> Copy:
        """Copy a file or directory of the guest to this host."""
        return self._copy(guest, copy_id, destination, source, inwards=False)

    def _copy(self, guest: Guest, copy_id: str, host: Path, guest_path: str, *, inwards: bool) -> Copy:
        request = {
            "is": "copy",
            "id": copy_id,
            "guest": guest.id,
            "token": new_token(),
            "inwards": inwards,
            "host": str(host),
            "guest_path": guest_path,
            "at": time.time(),
        }
        self._drop_oldest()
        try:
            copy = self._rebuild(self._outbox.asked(request), guest)
        except OSError as error:
            raise ConfigError(f"the outbox of this host agent cannot be written: {error.strerror}") from None
        self._log.info(
            "{vm} {copy}: copy {direction} of {path}", event=Happened.COPY_ASKED, path=guest_path, **copy.about
        )
        copy.noted = False
        self._commits.after_flush(lambda failure: self._noted(copy, failure))
        return copy

    def _noted(self, copy: Copy, failure: OSError | None) -> None:
        copy.noted = True
        if failure is not None:
            reason = f"the outbox of this host agent cannot be written: {failure.strerror}"
            self._end(copy, Copied(copy.id, reason=reason))
        if copy.result is None:
            self._ask(copy)

    def _ask(self, copy: Copy) -> None:
        if copy.guest is not None:
            copy.guest.link.send(copy.message, lambda: self._outbox.delivered(copy.record))

    def _drop_oldest(self) -> None:
        ended = [c for c in self._copies.values() if c.result is not None]
        for copy in ended[: max(0, len(ended) - KEEP_ENDED)]:
            del self._copies[copy.id]
            self._outbox.forgotten(copy.record)

    def copied(self, guest: Guest, message: Copied) -> None:
        """The guest says how a copy ended."""
        copy = self._copies.get(message.command)
        if copy is not None and copy.guest is guest and copy.result is None:
            self._end(copy, message)
        self._commits.confirm(guest, message.command)

    def _end(self, copy: Copy, result: Copied) -> None:
        copy.result, copy.ended_at = result, time.time()
        self._log.info(
            "{vm} {copy}: {outcome}",
            event=Happened.COPY_ENDED,
            outcome=f"failed: {result.reason}" if result.reason else f"copied {result.bytes} bytes",
            failed=bool(result.reason),
            reason=result.reason,
            bytes=result.bytes,
            files=result.files,
            seconds=None if copy.record.asked_at is None else max(0.0, copy.ended_at - copy.record.asked_at),
            **copy.about,
        )
        self._close(copy)
        try:
            self._outbox.ended(copy.record, fields_of(result))
        except OSError as error:
            self._log.error("the end of {id} is not in the outbox: {error}", id=copy.id, error=error)
        copy.watchers.clear()
        waiters, copy.waiters = copy.waiters, []
        for waiter in waiters:
            _answer(waiter, result)

    # -- reconciliation

    def view(self, copy_id: str) -> HostView:
        copy = self._copies.get(copy_id)
        if copy is None:
            return HostView.UNKNOWN
        if copy.result is not None:
            return HostView.ENDED
        return HostView.DELIVERED if copy.record.delivered else HostView.ASKED

    def act(self, action: Action, guest: Guest, copy_id: str) -> None:
        """As for commands, but what the guest has forgotten is asked for again, and what nobody awaits may go on."""
        if action is Action.CONFIRM:
            self._commits.confirm(guest, copy_id)
        elif action in (Action.ASK, Action.RESUME, Action.LOST) and self._copies[copy_id].noted:
            self._ask(self._copies[copy_id])

    def guest_gone(self, guest: Guest, reason: str) -> None:
        for copy in self.of(guest):
            self._end(copy, Copied(copy.id, reason=reason))

    # -- snapshots

    def mark(self, guest: Guest) -> list[dict[str, Any]]:
        return [{"request": copy.record.request, "delivered": copy.record.delivered} for copy in self.of(guest)]

    def roll_back(self, guest: Guest, mark: list[dict[str, Any]], reason: str) -> None:
        """As for commands. What a guest had sent of a file belongs to the time that was undone: it begins again."""
        then = {entry["request"]["id"]: entry for entry in mark}
        for copy in self.of(guest):
            if copy.id not in then:
                self._end(copy, Copied(copy.id, reason=f"{UNDONE}: {reason}"))
        for copy_id, entry in then.items():
            known = self._copies.get(copy_id)
            if known is None:
                known = self._rebuild(self._outbox.asked(entry["request"]), guest)
            self._outbox.reopened(known.record, delivered=entry["delivered"])
            known.result = None
            self._close(known)
            self._open(known)
