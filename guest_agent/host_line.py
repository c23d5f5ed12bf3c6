"""The line to the host beside the network: JSON lines through standard input, see `privileged.py`.

    {"time": seconds since 1970, "restored": bool}       the machine stood still; the clock is set already
    {"time": …, "config": true, "restored": true}        the settings are there: this machine is a clone
    {"config": true, "restored": true, "changed": true}  the settings are others now: it was restored elsewhere

A restored machine's connections are broken, though nothing in it can know: what it waits for would never come.
Any other line says that a host agent is there: it need not be waited for.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet.interfaces import IReadDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

READY = b'{"waiting": true}\n'
LOOK_AGAIN = 0.5  # seconds
STDIN = 0


@implementer(IReadDescriptor)
class HostLine:
    """Calls `restored` when this machine goes on from an earlier state, `changed` when it has other settings.

    Calls `there` when a host agent says anything else.
    """

    _log = Logger()

    def __init__(
        self, reactor: Any, restored: Callable[[], None], changed: Callable[[], None], there: Callable[[], None]
    ) -> None:
        self._reactor = reactor
        self._restored = restored
        self._changed = changed
        self._there = there
        self._words = b""

    def start(self) -> None:
        os.set_blocking(STDIN, False)
        self._reactor.addReader(self)

    def fileno(self) -> int:
        return STDIN

    def logPrefix(self) -> str:
        return "host line"

    def doRead(self) -> None:
        try:
            data = os.read(STDIN, 65536)
        except BlockingIOError:
            return
        if not data:
            self._reactor.removeReader(self)  # whoever listens to the host for us has ended
            return
        *lines, self._words = (self._words + data).split(b"\n")
        for line in lines:
            told = json.loads(line)
            if told.get("changed"):
                self._changed()
            elif told.get("restored"):
                self._log.info("this machine goes on from an earlier state")
                self._restored()
            else:
                self._there()

    def connectionLost(self, reason: Failure) -> None:
        pass  # the reactor ends


def wait_for_settings(path: Path) -> None:
    """Tell the host that all is loaded, and wait until the settings are there: this machine becomes a template."""
    os.write(STDIN, READY)
    while not path.exists():
        data = os.read(STDIN, 65536)
        if not data:
            time.sleep(LOOK_AGAIN)
