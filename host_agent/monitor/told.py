"""What a STATUS message may tell, in the form that the model expects: whoever can write to a topic can write anything.

Only fields that are known are taken. A text is cut, what is no finite number is unknown; a row without what names it
is left out.
"""

from __future__ import annotations

import json
import math
from typing import Any

import attrs

from common.errors import ProtocolError

from .table import Row

MOST_ROWS = 5000  # of one list
MOST_TEXT = 500
MOST_FIELDS = 40  # of an event
MOST_AHEAD = 1e15  # of a number

_NUMBERS = frozenset((
    "pid", "started_at", "cpus", "load", "memory_bytes", "memory_available_bytes", "agent_cpu_s", "agent_rss_bytes",
    "epoch", "memory_mb", "cpu_s", "memory_used_bytes", "last_seen_s", "commands", "asked_at", "ended_at",
    "deadline_s", "rss_bytes", "fraction", "wall_s", "exit_code", "stdout_bytes", "stderr_bytes", "bytes",
    "total_bytes", "seq", "time", "seconds", "latency_s", "max_rss_bytes", "files",
))  # fmt: skip
_TEXTS = {
    "host": ("version",),
    "vms": ("vm", "instance", "state", "agent", "hypervisor", "image", "agent_version", "reason"),
    "commands": ("vm", "instance", "command", "state", "argv", "outcome", "signal", "reason"),
    "copies": ("vm", "instance", "copy", "direction", "guest_path", "reason"),
}
_NAMED_BY = {"vms": "instance", "commands": "command", "copies": "copy"}
_TIMES = ("asked_at", "started_at", "ended_at", "time")
LISTS = ("vms", "commands", "copies", "checkpoints", "events")


@attrs.frozen
class View:
    """One payload."""

    host: Row | None = None
    vms: list[Row] = attrs.field(factory=list)
    commands: list[Row] = attrs.field(factory=list)
    copies: list[Row] = attrs.field(factory=list)
    checkpoints: list[Row] = attrs.field(factory=list)
    events: list[Row] = attrs.field(factory=list)

    @classmethod
    def together(cls, parts: list[View]) -> View:
        """The parts of one round, in order."""
        host = next((part.host for part in parts if part.host is not None), None)
        return cls(host, *([row for part in parts for row in getattr(part, name)] for name in LISTS))


def read(payload: bytes, shift: float) -> View:
    """ProtocolError when it is nothing of the kind. `shift`: seconds by which our clock is ahead of the sender's."""
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError):
        raise ProtocolError("a status is not JSON") from None
    if not isinstance(value, dict):
        raise ProtocolError("a status is not a JSON object")
    host = value.get("host")
    return View(
        _row("host", host, shift) if isinstance(host, dict) else None,
        *(_rows(name, value.get(name), shift) for name in LISTS),
    )


def _rows(name: str, value: Any, shift: float) -> list[Row]:
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > MOST_ROWS:
        raise ProtocolError(f"{name} of a status must be a list of at most {MOST_ROWS}")
    if name in ("events", "checkpoints"):
        return [_event(each, shift) for each in value if isinstance(each, dict) and _whole(each.get("seq"))]
    rows = (_row(name, each, shift) for each in value if isinstance(each, dict))
    return [row for row in rows if row[_NAMED_BY[name]]]


def _row(name: str, value: dict[str, Any], shift: float) -> Row:
    row: Row = {field: _text(value.get(field)) for field in _TEXTS[name]}
    row.update({field: number(value.get(field)) for field in value if field in _NUMBERS})
    if name == "copies":
        row["failed"] = value.get("failed") is True
    return _shifted(row, shift)


def _event(value: dict[str, Any], shift: float) -> Row:
    event: Row = {}
    for field, each in list(value.items())[:MOST_FIELDS]:
        if len(field) <= 40 and isinstance(each, (str, bool, int, float)):
            event[field] = each[:MOST_TEXT] if isinstance(each, str) else each if each is True else number(each)
    for field in ("event", "text", "level", "vm", "instance", "command", "copy", "action", "reason", "program"):
        if field in event:
            event[field] = _text(event[field])
    event.setdefault("text", "")
    event.setdefault("event", "?")
    for field in _NUMBERS & event.keys():
        event[field] = number(event[field])
    return _shifted({**event, "time": event.get("time") or 0.0}, shift)


def _shifted(row: Row, shift: float) -> Row:
    if shift:
        row.update({field: row[field] + shift for field in _TIMES if row.get(field) is not None})
    return row


def _text(value: Any) -> str:
    return value[:MOST_TEXT] if isinstance(value, str) else ""


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def number(value: Any) -> Any:
    """The finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if -MOST_AHEAD < value < MOST_AHEAD and math.isfinite(value) else None
