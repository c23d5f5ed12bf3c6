"""Where the time goes in a process that is measured: `python -m benchmarks NAME --profile`.

Host agents and embedded brokers are then run under Python's cProfile, which makes them slower; the ratios of such a run
mean nothing. At the end the functions that took the most CPU time themselves are printed, for each process.
"""

from __future__ import annotations

import os
import pstats
import sys
from pathlib import Path

VARIABLE = "VMWRAPPER_BENCH_PROFILE"  # the directory for profiles
MOST = 15


def python(module: str, name: str) -> list[str]:
    """How to start a module, under the profiler where that was asked for."""
    place = os.environ.get(VARIABLE)
    if not place:
        return [sys.executable, "-m", module]
    number = sum(1 for _ in Path(place).iterdir())
    file = Path(place) / f"{number:02}-{name}"
    file.touch()
    return [sys.executable, "-m", "cProfile", "-o", str(file), "-m", module]


def show() -> None:
    """Print what was written."""
    for file in sorted(Path(os.environ[VARIABLE]).iterdir()):
        if file.stat().st_size:
            print(f"\n{file.name}:")
            statistics = pstats.Stats(str(file))
            statistics.sort_stats("tottime").print_stats(MOST)
