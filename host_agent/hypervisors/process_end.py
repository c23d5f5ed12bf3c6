"""The end of a process that is not our child, as the kernel tells it (pidfd; Linux 5.3)."""

from __future__ import annotations

import os
from typing import Any

from twisted.internet.abstract import FileDescriptor
from twisted.internet.defer import Deferred, succeed


def process_end(reactor: Any, pid: int) -> Deferred[None]:
    """Fires when the process has ended and everything that it held is free; at once when there is none."""
    try:
        descriptor = os.pidfd_open(pid)
    except (OSError, AttributeError):  # it is gone; or the system has no such thing, and who waits tries a little early
        return succeed(None)
    end = _End(descriptor, reactor)
    end.startReading()  # type: ignore[no-untyped-call]
    return end.seen


class _End(FileDescriptor):
    def __init__(self, descriptor: int, reactor: Any) -> None:
        super().__init__(reactor)
        self._descriptor = descriptor
        self.seen: Deferred[None] = Deferred(lambda _: self._close())

    def fileno(self) -> int:
        return self._descriptor

    def doRead(self) -> None:
        self._close()
        self.seen.callback(None)

    def _close(self) -> None:
        self.stopReading()  # type: ignore[no-untyped-call]
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)
