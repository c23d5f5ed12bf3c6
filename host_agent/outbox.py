"""The outbox: what this host agent has asked of guests, on disk until it is answered and beyond.

One JSON object a line (`common/line_log.py`). A request is there before it is sent, so that a host agent that is
killed and started again knows what it asked for, and never asks for it under another id:

    {"is": "asked", "id": …, "guest": …, "run": {…}, "stdout": …, "stderr": …, "starts": [0, 0]}
    {"is": "copy", "id": …, "guest": …, "token": …, "inwards": true, "host": …, "guest_path": …}
    {"is": "delivered", "id": …}      {"is": "ended", "id": …, "result": {…}}      {"is": "forgotten", "id": …}
    {"is": "reopened", "id": …, "delivered": true}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from common.line_log import LineLog

COMPACT_AFTER = 4000  # lines of forgotten requests


@attrs.define
class Record:
    """One request, as the outbox knows it."""

    id: str
    guest: str
    request: dict[str, Any]  # the line that asked
    delivered: bool = False
    result: dict[str, Any] | None = None

    @property
    def is_copy(self) -> bool:
        return bool(self.request["is"] == "copy")

    @property
    def asked_at(self) -> float | None:
        """Seconds since 1970; None: an older host agent did not write it down."""
        at = self.request.get("at")
        return float(at) if isinstance(at, (int, float)) else None


class Outbox:
    """`records` by id, oldest first."""

    def __init__(self, path: Path) -> None:
        self._log = LineLog(path)
        self.records: dict[str, Record] = {}
        for entry in self._log.entries:
            self._take(entry)
        self._log.entries.clear()

    def _take(self, entry: dict[str, Any]) -> None:
        what, key = entry.get("is"), entry.get("id")
        if not isinstance(key, str):
            return
        if what in ("asked", "copy"):
            self.records[key] = Record(key, str(entry.get("guest", "")), entry)
        elif what == "forgotten":
            self.records.pop(key, None)
        elif key in self.records:
            record = self.records[key]
            if what == "delivered":
                record.delivered = True
            elif what == "ended":
                record.result = entry.get("result") or {}
            elif what == "reopened":
                record.result, record.delivered = None, bool(entry.get("delivered"))

    def asked(self, request: Mapping[str, Any]) -> Record:
        """Note a request, which may be sent now, and answered after the next flush.

        OSError: it is not noted, and must not be sent. What is noted outlives this agent; a power cut before the flush
        takes the guest along, too, and whoever asked has not been answered.
        """
        entry = dict(request)
        self._log.append(entry, flush=False)
        record = self.records[entry["id"]] = Record(entry["id"], entry["guest"], entry)
        return record

    def delivered(self, record: Record) -> None:
        """The guest has it. Not flushed: what outlives this agent is enough, as a host's death takes the VM along."""
        if not record.delivered:
            record.delivered = True
            self._log.append({"is": "delivered", "id": record.id}, flush=False)

    def ended(self, record: Record, result: Mapping[str, Any]) -> None:
        """Note the end; the guest may forget it after the next `flush`. OSError: it is not noted."""
        record.result = dict(result)
        self._log.append({"is": "ended", "id": record.id, "result": record.result}, flush=False)

    def flush(self) -> None:
        """All that was noted survives a power cut. OSError: it may not."""
        self._log.flush()

    def begin_flush(self) -> Callable[[], None] | None:
        """As `flush`, by what is returned, in another thread. None: nothing is to be done."""
        return self._log.begin_flush()

    def reopened(self, record: Record, *, delivered: bool) -> None:
        """The guest went back to a time when this had not ended."""
        record.result, record.delivered = None, delivered
        self._log.append({"is": "reopened", "id": record.id, "delivered": delivered})

    def forgotten(self, record: Record) -> None:
        """Nobody can ask for it any more."""
        if self.records.pop(record.id, None) is not None:
            self._log.append({"is": "forgotten", "id": record.id}, flush=False)
        if self._log.lines > COMPACT_AFTER + 3 * len(self.records):
            self._log.rewrite(entry for each in self.records.values() for entry in _lines(each))

    def close(self) -> None:
        self._log.close()


def _lines(record: Record) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [record.request]
    if record.delivered:
        lines.append({"is": "delivered", "id": record.id})
    if record.result is not None:
        lines.append({"is": "ended", "id": record.id, "result": record.result})
    return lines
