"""Logging: Twisted's logger, one event one line, as text for people or as JSON for programs.

    2026-03-01T12:00:00.123Z host-agent info: box c-9b1…: exited 0
    {"time": 1772366400.123, "program": "host-agent", "level": "info", "text": "…", "vm": "box", "command": "c-9b1…", …}

Lines of both agents that are about a command carry its id, so they can be found together (`vmctl trace`).
"""

from __future__ import annotations

import enum
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from twisted.logger import ILogObserver, LogLevel, formatEvent, globalLogBeginner
from twisted.logger._interfaces import LogEvent
from zope.interface import implementer

MOST_BYTES = 4 * 1024 * 1024  # of a log file; then it becomes FILE.1, and FILE.1 becomes FILE.2, the last
KEPT = 2
MOST_LINE = 32 * 1024  # characters
_OTHERS = ("twisted", "log_legacy")  # whose lines are not ours
_OWN_FIELDS = frozenset(("isError", "message", "time", "system", "format", "text", "program", "level", "error"))


class LogFormat(enum.Enum):
    TEXT = "text"
    JSON = "json"


def text_of(event: LogEvent) -> str:
    """What an event says; worked out once, for all who look at it."""
    text = event.get("log_text")
    if text is None:
        try:
            text = event["log_format"].format_map(event)  # as formatEvent, at a tenth of its cost
        except Exception:
            text = formatEvent(event)  # what only Twisted's own formats may have, or a value that cannot be shown
        event["log_text"] = text
    return str(text)


class RotatingFile:
    """A log file of bounded size. Standard error goes there too, so that the words of a crash are not elsewhere."""

    def __init__(self, path: Path, most_bytes: int = MOST_BYTES) -> None:
        self._path = path
        self._most = most_bytes
        self._file = -1
        self._open()

    def _open(self) -> None:
        opened = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        if self._file >= 0:
            os.close(self._file)
        self._file = opened
        self._size = os.fstat(opened).st_size
        os.dup2(opened, 2)

    def write(self, text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")
        if self._size + len(data) > self._most and self._size:
            self._rotate()
        try:
            os.write(self._file, data)
        except OSError:
            return  # a full disk must not end the program that logs
        self._size += len(data)

    def _rotate(self) -> None:
        for number in range(KEPT, 0, -1):
            older = self._path if number == 1 else self._path.with_name(f"{self._path.name}.{number - 1}")
            try:
                older.replace(self._path.with_name(f"{self._path.name}.{number}"))
            except OSError:
                pass  # there is none yet; or nothing can be renamed, and the file grows on
        self._open()

    def flush(self) -> None:
        """Nothing waits."""


@implementer(ILogObserver)
class LogLines:
    """Turns log events into lines. `about` is put into each JSON line: who writes."""

    def __init__(self, program: str, form: LogFormat, out: Any, *, debug: bool) -> None:
        self.about: dict[str, Any] = {}
        self._program = program
        self._form = form
        self._out = out
        self._debug = debug
        self._noise = () if debug else (LogLevel.debug, LogLevel.info)  # the latter from others only

    def __call__(self, event: LogEvent) -> None:
        level: Any = event.get("log_level") or LogLevel.info
        # Factories announce every start and stop at info level; that is noise for people.
        if level in self._noise and (level is LogLevel.debug or event.get("log_namespace", "").startswith(_OTHERS)):
            return
        text = text_of(event)
        failure = event.get("log_failure")
        if failure is not None:
            full = level == LogLevel.critical or self._debug
            text = f"{text}\n{failure.getTraceback()}" if full else f"{text}: {failure.value}"
        when = float(event.get("log_time", time.time()))
        write = self._json if self._form is LogFormat.JSON else self._text
        self._out.write(write(when, level.name, text[:MOST_LINE], event) + "\n")
        self._out.flush()

    def _text(self, when: float, level: str, text: str, event: LogEvent) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(when))
        lines = text.splitlines()
        one_line = " | ".join(line.strip() for line in lines if line.strip()) if len(lines) > 1 else text.strip()
        return f"{stamp}.{int(when % 1 * 1000):03}Z {self._program} {level}: {one_line}"

    def _json(self, when: float, level: str, text: str, event: LogEvent) -> str:
        line: dict[str, Any] = {"time": round(when, 6), "program": self._program, "level": level, "text": text}
        line.update(self.about)
        for key, value in event.items():
            if not key.startswith("log_") and key not in _OWN_FIELDS:
                if isinstance(value, enum.Enum):
                    value = value.value
                if value is None or isinstance(value, (str, int, float, bool)):
                    line[key] = value[:MOST_LINE] if isinstance(value, str) else value
        return json.dumps(line)


def start_logging(
    program: str,
    *,
    debug: bool = False,
    stream: Any = None,
    form: LogFormat = LogFormat.TEXT,
    file: Path | None = None,
) -> LogLines:
    """Write events from now on to `file`, which is rotated; without one to `stream` (default: standard error)."""
    out = RotatingFile(file) if file is not None else stream or sys.stderr
    lines = LogLines(program, form, out, debug=debug)
    globalLogBeginner.beginLoggingTo([lines], redirectStandardIO=False, discardBuffer=True)
    return lines
