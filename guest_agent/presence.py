"""Beacons: the guest says, now and then, that it is alive and how it does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall

from common.config import GuestConfig
from common.messages import MOST_TOLD, Beacon

from . import VERSION


class Presence:
    """Sends a beacon at the period that the host asked for."""

    def __init__(
        self,
        clock: IReactorTime,
        config: GuestConfig,
        running: Callable[[], Mapping[str, float]],
        send: Callable[[Beacon], None],
    ) -> None:
        """`running`: the seconds that each command has run."""
        self._config = config
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
        running = self._running()
        oldest = sorted(running.items(), key=lambda each: -each[1])[:MOST_TOLD]
        total, used = _memory()
        self._send(
            Beacon(
                guest=self._config.guest,
                uptime_s=time.monotonic() - self._born,
                load=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
                commands=len(running),
                memory_bytes=used,
                host=self._config.host,
                name=self._config.name,
                agent_version=VERSION,
                memory_total_bytes=total,
                cpus=os.cpu_count() or 0,
                cpu_s=_cpu_used(),
                running={command: round(seconds, 1) for command, seconds in oldest},
            )
        )


def _memory() -> tuple[int, int]:
    """Bytes of memory, all and in use, from /proc/meminfo; 0 where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return 0, 0
    values = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    total = values.get("MemTotal", 0)
    return total, max(0, total - values.get("MemAvailable", 0))


def _cpu_used() -> float:
    """Seconds that all processors have worked, from /proc/stat; 0 where there is none."""
    try:
        with Path("/proc/stat").open("rb") as opened:
            ticks = [int(word) for word in opened.readline().split()[1:]]
    except (OSError, ValueError):
        return 0.0
    idle = sum(ticks[3:5])  # and waiting for a disk; guests' time, from the ninth on, is in the first already
    return max(0, sum(ticks[:8]) - idle) / os.sysconf("SC_CLK_TCK")
