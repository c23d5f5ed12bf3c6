"""Rates and latencies over time: one point every two seconds, for the last twenty minutes."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Any

from host_agent.events import Happened

STEP = 2.0  # seconds
POINTS = 600
MOST_SAMPLES = 2000  # latencies of one step

NAMES = ("started", "ended", "failed", "copied", "latency_p50", "latency_p95", "depth", "events")


class Series:
    """Counts what happens, and makes a point of it at each step."""

    def __init__(self) -> None:
        self.points: deque[list[float | None]] = deque(maxlen=POINTS)  # time, then NAMES
        self._counts = dict.fromkeys(("started", "ended", "failed", "copied", "events"), 0.0)
        self._latencies: list[float] = []

    def event(self, event: dict[str, Any]) -> None:
        counts = self._counts
        counts["events"] += 1
        name = event.get("event")
        if name == Happened.COMMAND_STARTED:
            counts["started"] += 1
            latency = event.get("latency_s")
            if isinstance(latency, (int, float)) and len(self._latencies) < MOST_SAMPLES:
                self._latencies.append(latency)
        elif name == Happened.COMMAND_ENDED:
            counts["ended"] += 1
            if event.get("outcome") != "exited" or event.get("exit_code"):
                counts["failed"] += 1

    def copied(self, count: int) -> None:
        """Bytes that have moved."""
        self._counts["copied"] += max(0, count)

    def step(self, now: float, elapsed: float, depth: int | None) -> list[float | None]:
        """The point for the time that has just passed."""
        rate = {name: count / elapsed for name, count in self._counts.items()}
        latencies = sorted(self._latencies)
        p50 = p95 = None
        if latencies:
            p50 = statistics.median(latencies)
            p95 = latencies[min(len(latencies) - 1, int(len(latencies) * 0.95))]
        point: list[float | None] = [
            round(now, 1),
            *(round(rate[name], 3) for name in ("started", "ended", "failed")),
            round(rate["copied"]),
            None if p50 is None else round(p50, 5),
            None if p95 is None else round(p95, 5),
            depth,
            round(rate["events"], 2),
        ]
        self.points.append(point)
        self._counts = dict.fromkeys(self._counts, 0.0)
        self._latencies = []
        return point
