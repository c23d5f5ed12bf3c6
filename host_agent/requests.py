"""Everything that was asked of guests, seen from the guests' side: messages go to commands or copies, and when a
guest opens a session, both views of each request are put together by the rules of `reconcile.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
from twisted.logger import Logger

from common.errors import VMwrapperError
from common.files import write_private
from common.messages import Copied, Message

from .commands import Commands
from .copies import Copies
from .guests import Guest, GuestListener
from .reconcile import RULES, Action, GuestView, HostView


@attrs.define
class Requests(GuestListener):
    """Commands and copies of all guests."""

    commands: Commands
    copies: Copies
    _log = Logger()

    def load(self, find_guest: Callable[[str], Guest | None]) -> None:
        """Take up what an earlier host agent had asked for."""
        self.commands.load(find_guest)
        self.copies.load(find_guest)

    def guest_message(self, guest: Guest, message: Message) -> None:
        if isinstance(message, Copied):
            self.copies.copied(guest, message)
        else:
            self.commands.message(guest, message)

    def guest_session(self, guest: Guest, held: Mapping[str, str]) -> None:
        ours = [command.id for command in self.commands.of(guest)] + [copy.id for copy in self.copies.of(guest)]
        counts: dict[Action, int] = {}
        for request_id in [*ours, *(name for name in held if name not in set(ours))]:
            kind = self.copies if self.copies.view(request_id) is not HostView.UNKNOWN else self.commands
            view = GuestView(held[request_id]) if request_id in held else GuestView.ABSENT
            action = RULES[kind.view(request_id), view]
            counts[action] = counts.get(action, 0) + 1
            kind.act(action, guest, request_id)
        told = ", ".join(f"{action.value} {count}" for action, count in counts.items() if action is not Action.NOTHING)
        if told:
            self._log.info("{name}: reconciled: {told}", name=guest.name, told=told)

    def guest_gone(self, guest: Guest, reason: str) -> None:
        """The guest's VM ended."""
        self.commands.guest_gone(guest, reason)
        self.copies.guest_gone(guest, reason)

    def running_in(self, guest: Guest) -> int:
        return len(self.commands.of(guest))

    # -- snapshots

    def mark(self, guest: Guest, file: Path, note: Mapping[str, Any] | None = None) -> list[Path]:
        """Write down how far everything is that this guest does; while its VM stands still for a snapshot.

        `note`: what the requester wants to know again. Returns the files of output that belong to it.
        """
        mark = {"commands": self.commands.mark(guest), "copies": self.copies.mark(guest), "note": dict(note or {})}
        write_private(file, json.dumps(mark).encode("ascii"))
        return [stream.path for command in self.commands.of(guest) for stream in command.streams.values()]

    def can_roll_back(self, file: Path) -> bool:
        """Whether there is a mark, and all of the output that it names."""
        try:
            return self.commands.can_roll_back(_read(file)["commands"])
        except (VMwrapperError, KeyError, TypeError, ValueError):
            return False

    def roll_back(self, guest: Guest, file: Path, reason: str) -> None:
        """The guest goes back to where the mark was taken, and everything that it did since is undone."""
        mark = _read(file)
        self.commands.roll_back(guest, mark["commands"], reason, mark.get("note") or {})
        self.copies.roll_back(guest, mark["copies"], reason)


def _read(file: Path) -> dict[str, Any]:
    try:
        mark: dict[str, Any] = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise VMwrapperError(f"{file}: the snapshot's mark cannot be read: {error}") from None
    return mark
