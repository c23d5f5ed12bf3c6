"""The regression guard: short forms of benchmarks, their ratios beside what `recorded.toml` has, and a verdict.

    python -m benchmarks.guard              # a minute; CI runs it
    python -m benchmarks.guard --record     # write what is measured now, after a change that is meant to be one

Only ratios to something that was measured in the same run are looked at, and counts that must be nought. A value that
is worse than its record by more than twice its noise band is measured twice more, and only if the median of the three
is still so much worse does the guard fail: one that cries wolf is worse than none.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from statistics import median

import attrs

RECORDED = Path(__file__).with_name("recorded.toml")
DEADLINE = 120.0  # seconds for one run of one benchmark
TIMES = 3


@attrs.frozen
class Record:
    """One metric, of which less is better."""

    benchmark: str
    metric: str
    value: float
    band: float  # how far medians of three went from it, to either side, on the machine that it was recorded on

    def allows(self, value: float) -> bool:
        return value <= self.value + 2 * self.band


def load(file: Path = RECORDED) -> list[Record]:
    """What was recorded: `[benchmark.metric]` tables with `value` and `band`."""
    tables = tomllib.loads(file.read_text("utf-8"))
    return [
        Record(benchmark, metric, float(entry["value"]), float(entry["band"]))
        for benchmark, metrics in tables.items()
        for metric, entry in metrics.items()
    ]


def measure(benchmark: str) -> dict[str, float]:
    """One short run, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="vmwrapper-guard-") as folder:
        file = Path(folder) / "metrics.json"
        argv = [sys.executable, "-m", "benchmarks", benchmark, "--json", str(file)]
        env = {**os.environ, "VMWRAPPER_BENCH_SHORT": "1"}
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=DEADLINE, check=False)
        if done.returncode:
            raise RuntimeError(f"the benchmark {benchmark} failed:\n{(done.stdout + done.stderr)[-3000:]}")
        metrics: dict[str, float] = json.loads(file.read_text("utf-8"))["metrics"]
        return metrics


def judge(records: list[Record]) -> list[str]:
    """Measure and print; sentences about what has become worse."""
    worse = []
    print(f"{'benchmark':16} {'metric':32} {'now':>9} {'recorded':>9} {'band':>7}")
    for benchmark in dict.fromkeys(record.benchmark for record in records):
        of_it = [record for record in records if record.benchmark == benchmark]
        runs = [measure(benchmark)]
        if not all(record.allows(runs[0][record.metric]) for record in of_it):
            runs += [measure(benchmark) for _ in range(TIMES - 1)]
        for record in of_it:
            values = [run[record.metric] for run in runs]
            now = median(values)
            verdict = "" if record.allows(now) else "  WORSE"
            print(
                f"{benchmark:16} {record.metric:32} {now:9.2f} {record.value:9.2f} {record.band:7.2f}"
                f"{f'  of {len(values)}' if len(values) > 1 else ''}{verdict}",
                flush=True,
            )
            if verdict:
                worse.append(
                    f"{benchmark}: {record.metric} was {record.value:.2f} ± {record.band:.2f} and is {now:.2f}, "
                    f"median of {len(values)}"
                )
    return worse


def record(records: list[Record]) -> None:
    """Write medians of three, with the bands that there are unless the three went further apart."""
    lines = ["# What benchmarks/guard.py compares with; `python -m benchmarks.guard --record` writes it.\n"]
    for benchmark in dict.fromkeys(each.benchmark for each in records):
        runs = [measure(benchmark) for _ in range(TIMES)]
        for each in records:
            if each.benchmark == benchmark:
                values = [run[each.metric] for run in runs]
                band = max(each.band, median(values) - min(values), max(values) - median(values))
                lines.append(f"\n[{benchmark}.{each.metric}]\nvalue = {median(values):.2f}\nband = {band:.2f}\n")
    RECORDED.write_text("".join(lines), "utf-8")
    print(RECORDED.read_text("utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="measure three times and write the record anew")
    if parser.parse_args().record:
        record(load())
        return 0
    worse = judge(load())
    for sentence in worse:
        print(sentence, file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
