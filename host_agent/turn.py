"""Whose turn it is on this host: a lock on a file, for things that all VMs should not do at the same moment.

The kernel gives the lock back when its holder dies, however it dies; the file itself means nothing and stays.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from twisted.internet.task import deferLater

from .file_lock import try_lock

POLL = 0.2  # seconds between two looks: nobody rings a bell when a lock is given back


class Turn:
    """Holds `path` for one of all processes, and for one of its users in this process."""

    def __init__(self, reactor: Any, path: Path) -> None:
        self._reactor = reactor
        self._path = path
        self._handle = -1

    async def take(self, deadline: float) -> bool:
        """Wait for our turn; False when it does not come within `deadline` seconds. OSError."""
        until = self._reactor.seconds() + deadline
        while True:
            if self._handle < 0:
                handle = try_lock(self._path)
                if handle is not None:
                    self._handle = handle
                    return True
            if self._reactor.seconds() >= until:
                return False
            await deferLater(self._reactor, POLL)

    def give_back(self) -> None:
        """Let the next one have it."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)
