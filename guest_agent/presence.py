"""Beacons: the guest says, now and then, that it is alive and how it does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall

from common.messages import Beacon


class Presence:
    """Sends a beacon at the period that the host asked for."""

    def __init__(
        self, clock: IReactorTime, guest: str, running: Callable[[], int], send: Callable[[Beacon], None]
    ) -> None:
        self._guest = guest
        self._running = running
        self._send = send
        self._born = time.monotonic()
        self._call = LoopingCall(self._beacon)
        self._call.clock = clock

    def every(self, seconds: float) -> None:
        """Start, or go on at another period; 0 stops."""
        self.stop()
        if seconds > 0:
            self._call.start(max(1.0, seconds))

    def stop(self) -> None:
        if self._call.running:
            self._call.stop()

    def _beacon(self) -> None:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        uptime = time.monotonic() - self._born
        self._send(Beacon(self._guest, uptime, load, self._running(), _memory_used()))


def _memory_used() -> int:
    """Bytes of memory in use, from /proc/meminfo; 0 where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return 0
    values = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return max(0, values.get("MemTotal", 0) - values.get("MemAvailable", 0))
