"""The end of a process that is not our child: one that an earlier host agent started."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import psutil
from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.task import LoopingCall
from zope.interface import implementer

POLL = 1.0  # seconds, where the system has no descriptors for processes


@implementer(IReadDescriptor)
class _PidDescriptor:
    """Readable once the process has ended."""

    def __init__(self, descriptor: int, ended: Callable[[], None]) -> None:
        self._descriptor = descriptor
        self._ended = ended

    def fileno(self) -> int:
        return self._descriptor

    def doRead(self) -> None:
        self._ended()

    def connectionLost(self, reason: object) -> None:
        """The reactor ends."""

    def logPrefix(self) -> str:
        return "process"


def watch_process(reactor: Any, pid: int, ended: Callable[[], None]) -> Callable[[], None]:
    """Call `ended` when the process is gone; the returned function ends the watch."""
    try:
        descriptor = os.pidfd_open(pid)
    except (AttributeError, OSError):
        return _poll(reactor, pid, ended)
    reader = _PidDescriptor(descriptor, lambda: finish(True))
    open_ = True

    def finish(tell: bool = False) -> None:
        nonlocal open_
        if open_:
            open_ = False
            reactor.removeReader(reader)
            os.close(descriptor)
            if tell:
                ended()

    reactor.addReader(reader)
    return finish


def _poll(reactor: Any, pid: int, ended: Callable[[], None]) -> Callable[[], None]:
    def look() -> None:
        if not psutil.pid_exists(pid):
            finish()
            ended()

    call = LoopingCall(look)
    call.clock = reactor

    def finish() -> None:
        if call.running:
            call.stop()

    call.start(POLL, now=False)
    return finish
