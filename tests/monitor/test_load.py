"""A thousand guests and a hundred events a second: what the monitor and the browser cost, and how soon one sees.

A short form of `python -m benchmarks monitor`: on a machine with other work it asks for less than the long form shows.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.monitor import measure

GUESTS, RATE, SECONDS = 1000, 100.0, 8.0


def test_a_thousand_guests_and_a_hundred_events_a_second(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as thread:  # the other tests' browser has this thread's event loop
        found = thread.submit(measure, GUESTS, RATE, SECONDS, tmp_path).result()
    print(found)
    assert found.event_to_screen_median_s <= 1.0, found
    assert found.monitor_cpu <= 0.20, found
    assert found.monitor_bytes <= 120e6, found
    assert found.browser_cpu <= 0.30, found
    assert found.metrics_s <= 0.1, found
    assert found.filter_s <= 0.2, found
