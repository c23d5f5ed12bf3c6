"""What happens in a host agent, as everybody who watches it learns it: numbered events, of which the last are kept.

An event is a log event that carries one of the names below as `event`; so what is in the log and what watchers see
are the same. Its other fields say whom it is about (`vm`, `instance`, `command`, `copy`) and what was measured.
"""

from __future__ import annotations

import enum
import json
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import ILogObserver, LogLevel, globalLogPublisher
from twisted.logger._interfaces import LogEvent
from zope.interface import implementer

from common.errors import VMwrapperError
from common.link import new_session
from common.logs import text_of

MOST_EVENTS = 10_000  # kept
MOST_IN_A_BATCH = 1000
MOST_BATCH_BYTES = 512 * 1024  # a line of the control interface may have twice as many
MOST_TEXT = 500  # characters of one field
MOST_WAITERS = 64
MOST_WAIT = 60.0  # seconds

_OWN_FIELDS = frozenset(("event", "isError", "message", "time", "system", "format"))


class Happened(enum.StrEnum):
    """The names of events; `docs/control.md` says what each carries."""

    VM_STATE = "vm_state"
    GUEST_PRESENCE = "guest_presence"
    GUEST_SESSION = "guest_session"
    COMMAND_ASKED = "command_asked"
    COMMAND_DELIVERED = "command_delivered"
    COMMAND_STARTED = "command_started"
    COMMAND_SIGNAL = "command_signal"
    COMMAND_ENDED = "command_ended"
    COPY_ASKED = "copy_asked"
    COPY_ENDED = "copy_ended"
    CHECKPOINT = "checkpoint"
    BROKER_CONNECTED = "broker_connected"
    BROKER_LOST = "broker_lost"
    REFUSED = "refused"


NAMES = frozenset(name.value for name in Happened)

Listener = Callable[[dict[str, Any]], None]


class TooManyWaiters(VMwrapperError):
    """More watchers wait than are good for a host agent."""

    code = "refused"


@implementer(ILogObserver)
class EventLog:
    """The last events, oldest first. `start` begins to take them from the log, `stop` ends it."""

    def __init__(self, clock: IReactorTime, most: int = MOST_EVENTS) -> None:
        self.id = new_session()  # numbers count from 1 in each life of a host agent
        self.last = 0
        self.listeners: list[Listener] = []
        self._clock = clock
        self._events: deque[dict[str, Any]] = deque(maxlen=most)
        self._waiting: list[tuple[Deferred[None], IDelayedCall]] = []

    def start(self) -> None:
        globalLogPublisher.addObserver(self)

    def stop(self) -> None:
        globalLogPublisher.removeObserver(self)
        self._wake()

    def __call__(self, event: LogEvent) -> None:
        name = event.get("event")
        if not isinstance(name, str) or name not in NAMES:
            return
        self.last += 1
        level: Any = event.get("log_level", LogLevel.info)
        taken: dict[str, Any] = {
            "seq": self.last,
            "time": round(float(event.get("log_time", time.time())), 6),
            "event": str(getattr(name, "value", name)),
            "level": level.name,
            "text": text_of(event)[:MOST_TEXT],
        }
        for key, value in event.items():
            if key not in _OWN_FIELDS and key not in taken and not key.startswith("log_"):
                scalar = _scalar(value)
                if scalar is not None:
                    taken[key] = scalar
        self._events.append(taken)
        for listener in self.listeners:
            listener(taken)
        if self._waiting:
            self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter, timer in waiting:
            timer.cancel()
            # Later, so that whoever logged is not called back.
            self._clock.callLater(0, waiter.callback, None)

    def since(self, number: int) -> dict[str, Any]:
        """Events after `number`, at most a batch; `lost` says how many of them are kept no more."""
        batch: list[dict[str, Any]] = []
        size = 0
        oldest = self._events[0]["seq"] if self._events else self.last + 1
        first = max(number + 1, oldest)
        for event in islice(self._events, first - oldest, None):
            size += len(json.dumps(event))
            if len(batch) >= MOST_IN_A_BATCH or (size > MOST_BATCH_BYTES and batch):
                break
            batch.append(event)
        last = batch[-1]["seq"] if batch else max(number, self.last)
        return {"log": self.id, "events": batch, "last": last, "lost": max(0, first - number - 1) if batch else 0}

    def about(self, key: str, value: str) -> list[dict[str, Any]]:
        """All events that are kept and have this value."""
        return [event for event in self._events if event.get(key) == value]

    async def wait(self, log: str, number: int, seconds: float) -> dict[str, Any]:
        """As `since`, but when nothing has happened yet wait for it. Numbers of another `log` mean nothing here;
        -1 stands for the last event of all."""
        if number < 0:
            number = self.last
        elif log not in ("", self.id):
            number = 0
        number = min(number, self.last)
        if number == self.last and seconds > 0:
            if len(self._waiting) >= MOST_WAITERS:
                raise TooManyWaiters(f"{MOST_WAITERS} watchers wait for events already", "end some of them")
            waiter: Deferred[None] = Deferred()
            timer = self._clock.callLater(min(seconds, MOST_WAIT), self._give_up, waiter)
            self._waiting.append((waiter, timer))
            await waiter
        return self.since(number)

    def _give_up(self, waiter: Deferred[None]) -> None:
        self._waiting = [each for each in self._waiting if each[0] is not waiter]
        waiter.callback(None)


def _scalar(value: Any) -> Any:
    """What can stand in an event as it is; None: nothing of it."""
    if isinstance(value, str):
        return str(value)[:MOST_TEXT]
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return round(value, 6)
    return _scalar(value.value) if isinstance(value, enum.Enum) else None
