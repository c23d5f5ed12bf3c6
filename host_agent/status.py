"""What a host agent tells of itself on an external broker, for monitors that do not run on its machine.

A view of everything every ten seconds, and events as they come, on a topic that only monitors may read. It is what the
calls of `observe.py` answer, cut into messages of a size that every broker takes. What has ended is told for ten
minutes, and earlier events once a minute: all this is sent whether a monitor reads it or not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from twisted.internet.interfaces import IDelayedCall
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from common import messages
from common.messages import Envelope, Status

from .events import EventLog, Happened
from .observe import Observation

STATUS_EVERY = 10.0  # seconds between two views of everything
EVENTS_PAUSE = 0.25  # seconds in which events are gathered, so that many travel together
MOST_EVENTS = 500  # gathered; more are counted by their numbers, and seen in the next view
MOST_ENDED = 100  # commands or copies that have ended
ENDED_FOR = 600.0  # seconds for which they are told
MOST_PART = 128 * 1024  # bytes of a payload
AGAIN_EVERY = 6  # views between two that tell earlier events again, for a monitor that has just come
RECENT_EVENTS = 30
RECENT_CHECKPOINTS = 20

Part = dict[str, Any]


class StatusReporter:
    """Tells the status topic. `send` takes a destination and a body, and may lose it."""

    _log = Logger()

    def __init__(
        self,
        reactor: Any,
        host: str,
        agent: str,
        observation: Observation,
        events: EventLog,
        send: Callable[[str, bytes], None],
    ) -> None:
        self._reactor = reactor
        self._host = host
        self._agent = agent
        self._observation = observation
        self._events = events
        self._send = send
        self._round = 0
        self._fresh: list[Part] = []
        self._waiting: IDelayedCall | None = None
        self._telling = LoopingCall(self._tell_all)
        self._telling.clock = reactor

    def start(self) -> None:
        """Begin; once the broker is there, and again when it is there again."""
        if self._telling.running:
            self._telling.reset()
            self._tell_all()
            return
        self._events.listeners.append(self._happened)
        self._telling.start(STATUS_EVERY)

    def stop(self) -> None:
        """Say goodbye."""
        if not self._telling.running:
            return
        self._telling.stop()
        self._events.listeners.remove(self._happened)
        if self._waiting is not None and self._waiting.active():
            self._waiting.cancel()
        self._tell_events()
        self._tell({}, gone=True)

    def _happened(self, event: Part) -> None:
        if len(self._fresh) < MOST_EVENTS:
            self._fresh.append(event)
        if self._waiting is None:
            self._waiting = self._reactor.callLater(EVENTS_PAUSE, self._tell_events)

    def _tell_events(self) -> None:
        self._waiting = None
        fresh, self._fresh = self._fresh, []
        for part in cut({"events": fresh}):
            self._tell(part)

    def _tell_all(self) -> None:
        try:
            parts = list(cut(self._view()))
        except Exception:  # what cannot be told now is no reason to tell nothing ever after
            self._log.failure("the status of this host agent cannot be told")
            return
        self._round += 1
        for number, part in enumerate(parts):
            self._tell(part, round=self._round, part=number, parts=len(parts))

    def _view(self) -> Part:
        look = self._observation

        def nothing(name: str, data: dict[str, Any]) -> None:
            """Nobody waits for updates."""

        again: Part = {}
        if self._round % AGAIN_EVERY == 0:
            again["events"] = self._events.since(self._events.last - RECENT_EVENTS)["events"]
            again["checkpoints"] = self._events.about("event", Happened.CHECKPOINT.value)[-RECENT_CHECKPOINTS:]
        return {
            "host": look.host({}, nothing),
            "vms": look.all_vms(),
            "commands": _recent(look.commands({}, nothing)["commands"]),
            "copies": _recent(look.copies({}, nothing)["copies"]),
            **again,
        }

    def _tell(self, content: Part, **more: Any) -> None:
        payload = json.dumps(content, separators=(",", ":")).encode("ascii")
        if len(payload) > messages.MAX_PAYLOAD:
            self._log.warn("a part of the status is too large to be told: {size} bytes", size=len(payload))
            return
        status = Status(self._host, self._agent, time.time(), log=self._events.id, payload=payload, **more)
        self._send(messages.STATUS, messages.encode(Envelope(status, "", "")))


def _recent(entries: list[Part]) -> list[Part]:
    """All that have not ended, and the newest of those that have lately."""
    since = time.time() - ENDED_FOR
    ended = [entry for entry in entries if entry["ended_at"] is not None and entry["ended_at"] > since]
    return [entry for entry in entries if entry["ended_at"] is None] + ended[-MOST_ENDED:]


def cut(view: Part, most: int = MOST_PART) -> Iterator[Part]:
    """The view in parts of about so many bytes each; a list may be spread over several. None of an empty list alone."""
    part: Part = {}
    size = 0
    for name, value in view.items():
        if not isinstance(value, list):
            part[name] = value
            size += len(json.dumps(value))
            continue
        if len(view) > 1:
            part.setdefault(name, [])
        for entry in value:
            length = len(json.dumps(entry))
            if size + length > most and part:
                yield part
                part, size = {}, 0
            part.setdefault(name, []).append(entry)
            size += length
    if part:
        yield part
