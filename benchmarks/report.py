"""What benchmarks print: a table with median, 99th percentile and our ratio to each peer and to the limit."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median, quantiles

OURS = "ours"
MOST_SECONDS = 420.0  # after which no more rounds are begun


def in_turn(work: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, `rounds` times, one after the other, so that what else the machine does meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in rounds_of(rounds):
        for name, action in work.items():
            times[name].append(timed(action))
    return times


def in_rows(
    work: Mapping[str, Callable[[], float]], rows: int, row: int, cpu_s: Callable[[], float]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each, as it says them, `row` times one after the other, and the rows in turn; CPU seconds of each row.

    In turn after each single one, the processors would have forgotten everybody's code and data when its turn comes.
    What is left to be done after an answer is its row's.
    """
    times: dict[str, list[float]] = {name: [] for name in work}
    cpu: dict[str, list[float]] = {name: [] for name in work}
    for _ in rounds_of(rows):
        for name, action in work.items():
            before = cpu_s()
            times[name] += [action() for _ in range(row)]
            cpu[name].append(cpu_s() - before)
    return times, cpu


def rounds_of(count: int) -> Iterator[int]:
    """Their numbers; on a machine that is too busy for them there are fewer, which is said."""
    until = time.monotonic() + MOST_SECONDS
    for number in range(count):
        if number and time.monotonic() > until:
            print(f"only {number} of {count} rounds: they have taken {MOST_SECONDS:.0f} s")
            return
        yield number


def timed(action: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def p99(values: Sequence[float]) -> float:
    """The 99th percentile; of a few values nearly the largest."""
    return quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]


def show(
    title: str,
    values: Mapping[str, Sequence[float]],
    unit: str,
    *,
    scale: float = 1.0,
    ours: str = OURS,
    missing: Mapping[str, str] | None = None,
) -> None:
    """Print a table. `missing` has the peers that cannot run here, and why."""
    mine = median(values[ours])
    print(f"{title}, {unit}")
    print(f"  {'':34} {'median':>11} {'p99':>11} {'n':>5} {'ours to it':>11}")
    for name, each in values.items():
        middle = median(each)
        ratio = "" if name == ours or not middle else f"{mine / middle:11.2f}"
        print(f"  {name:34} {middle * scale:11.3f} {p99(each) * scale:11.3f} {len(each):5} {ratio}")
    for name, reason in (missing or {}).items():
        print(f"  {name:34} not measured: {reason}")
    sys.stdout.flush()
