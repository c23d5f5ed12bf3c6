"""Logging: Twisted's logger, one event one line, on standard error."""

from __future__ import annotations

import sys
from typing import TextIO

from twisted.logger import (
    FilteringLogObserver,
    ILogObserver,
    LogLevel,
    LogLevelFilterPredicate,
    formatEvent,
    formatTime,
    globalLogBeginner,
)
from twisted.logger._interfaces import LogEvent


def start_logging(program: str, *, debug: bool = False, stream: TextIO | None = None) -> None:
    """Write events to `stream` (default: standard error) from now on."""
    out = stream or sys.stderr

    def observe(event: LogEvent) -> None:
        level = event.get("log_level")
        text = formatEvent(event)
        failure = event.get("log_failure")
        if failure is not None:
            text = (
                f"{text}\n{failure.getTraceback()}"
                if level == LogLevel.critical or debug
                else f"{text}: {failure.value}"
            )
        when = formatTime(event["log_time"], "%H:%M:%S") if "log_time" in event else ""
        name = level.name if level is not None else "info"
        out.write(f"{when} {program} {name}: {text}\n")
        out.flush()

    predicate = LogLevelFilterPredicate(defaultLogLevel=LogLevel.debug if debug else LogLevel.info)
    # Factories announce every start and stop at info level; that is noise for people.
    predicate.setLogLevelForNamespace("twisted", LogLevel.debug if debug else LogLevel.warn)
    predicate.setLogLevelForNamespace("log_legacy", LogLevel.debug if debug else LogLevel.warn)
    observer: ILogObserver = FilteringLogObserver(observe, [predicate])  # type: ignore[arg-type]
    globalLogBeginner.beginLoggingTo([observer], redirectStandardIO=False, discardBuffer=True)
