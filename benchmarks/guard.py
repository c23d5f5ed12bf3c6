"""The regression guard: short forms of benchmarks, their ratios beside what `recorded.toml` has, and a verdict.

    python -m benchmarks.guard              # three minutes; CI runs it
    python -m benchmarks.guard --record     # write what is measured now, after a change that is meant to be one
    python -m benchmarks.guard --record broker copy     # of these benchmarks alone

What is looked at: ratios to something that was measured in the same run, of CPU time to CPU time where there is such a
one, memory, and counts that must be nought. A value that is worse than its record by more than twice its noise band is
measured twice more, and only if the median of the three is still so much worse does the guard fail: one that cries wolf
is worse than none. Values are of a quiet machine; `loaded` are runs on busy ones, and bands reach so far that these
would not be blamed. So what does not end in its time, or
is not begun in four minutes, because the machine is busy, is named and judges nobody.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from statistics import median

import attrs

RECORDED = Path(__file__).with_name("recorded.toml")
DEADLINE = 120.0  # seconds for one run of one benchmark; on a machine with nothing else to do, 30 are much
MOST_SECONDS = 240.0  # after which no other benchmark is begun
END_DEADLINE = 60.0  # for its VMs and brokers
TIMES = 3
LEAST_BAND = 0.1  # of a value: what another Python or another disk changes is no regression
RECORDED_RUNS = 5


@attrs.frozen
class Record:
    """One metric, of which less is better, or more."""

    benchmark: str
    metric: str
    value: float  # the median of the runs that were recorded
    band: float  # how far the farthest of them was from it
    more_is_better: bool = False

    def allows(self, value: float) -> bool:
        if self.more_is_better:
            return value >= self.value - 2 * self.band
        return value <= self.value + 2 * self.band


def load(file: Path = RECORDED) -> list[Record]:
    """What was recorded: `[benchmark.metric]` tables with `value`, `band` and the `runs` that they are from."""
    tables = tomllib.loads(file.read_text("utf-8"))
    return [
        Record(benchmark, metric, float(entry["value"]), float(entry["band"]), entry.get("better") == "more")
        for benchmark, metrics in tables.items()
        for metric, entry in metrics.items()
    ]


class TooSlow(Exception):
    """A benchmark did not end in its time."""


def measure(benchmark: str, deadline: float = DEADLINE) -> dict[str, float]:
    """One short run, in a process of its own. Raises TooSlow."""
    with tempfile.TemporaryDirectory(prefix="vmwrapper-guard-") as folder:
        file = Path(folder) / "metrics.json"
        argv = [sys.executable, "-m", "benchmarks", benchmark, "--json", str(file)]
        env = {**os.environ, "VMWRAPPER_BENCH_SHORT": "1"}
        words = Path(folder) / "words"
        with words.open("wb") as output:
            run = subprocess.Popen(argv, env=env, stdout=output, stderr=output)
            try:
                run.wait(deadline)
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGINT)  # it ends what it has started
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.wait(END_DEADLINE)
                run.kill()
                raise TooSlow(f"{benchmark} did not end in {deadline:.0f} s") from None
        if run.returncode:
            said = words.read_text("utf-8", "replace")[-3000:]
            raise RuntimeError(f"the benchmark {benchmark} failed:\n{said}")
        metrics: dict[str, float] = json.loads(file.read_text("utf-8"))["metrics"]
        return metrics


def judge(records: list[Record]) -> list[str]:
    """Measure and print; sentences about what has become worse."""
    worse = []
    print(f"{'benchmark':16} {'metric':32} {'now':>9} {'recorded':>9} {'band':>7}")
    until = time.monotonic() + MOST_SECONDS
    for benchmark in dict.fromkeys(record.benchmark for record in records):
        of_it = [record for record in records if record.benchmark == benchmark]
        if time.monotonic() > until:
            print(f"{benchmark:16} not measured: the others have taken {MOST_SECONDS:.0f} s", flush=True)
            continue
        try:
            runs = [measure(benchmark)]
            if not all(record.allows(runs[0][record.metric]) for record in of_it):
                runs += [measure(benchmark) for _ in range(TIMES - 1)]
        except TooSlow as reason:
            print(f"{benchmark:16} not measured, this machine is too busy: {reason}", flush=True)
            continue
        worse += [sentence for record in of_it if (sentence := _verdict(record, [run[record.metric] for run in runs]))]
    return worse


def _verdict(record: Record, values: list[float]) -> str:
    """Print a line; a sentence when it has become worse."""
    now = median(values)
    fine = record.allows(now)
    print(
        f"{record.benchmark:16} {record.metric:32} {now:9.2f} {record.value:9.2f} {record.band:7.2f}"
        f"{f'  of {len(values)}' if len(values) > 1 else ''}{'' if fine else '  WORSE'}",
        flush=True,
    )
    if fine:
        return ""
    was = f"{record.value:.2f} ± {record.band:.2f}"
    return f"{record.benchmark}: {record.metric} was {was} and is {now:.2f}, median of {len(values)}"


def band_of(value: float, runs: list[float], loaded: list[float]) -> float:
    """As far as its runs, and half as far as those of busy machines: twice is allowed."""
    farthest = max(abs(run - value) for run in runs)
    busy = max((abs(run - value) / 2 for run in loaded), default=0.0)
    return round(max(farthest, busy, LEAST_BAND * value), 3)


def record(benchmarks: list[str]) -> None:
    """Measure and write the record anew; other benchmarks than these stay as they are."""
    tables = tomllib.loads(RECORDED.read_text("utf-8"))
    for benchmark in benchmarks:
        runs = [measure(benchmark, MOST_SECONDS) for _ in range(RECORDED_RUNS)]
        for metric, entry in tables[benchmark].items():
            values = [round(run[metric], 3) for run in runs]
            entry["value"] = median(values)
            entry["band"] = band_of(entry["value"], values, entry.get("loaded", []))
            entry["runs"] = values
    lines = ["# What benchmarks/guard.py compares with; `python -m benchmarks.guard --record` writes it.\n"]
    for benchmark, metrics in tables.items():
        for metric, entry in metrics.items():
            # JSON's texts, numbers and lists are TOML's, too.
            text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in entry.items())
            lines.append(f"\n[{benchmark}.{metric}]\n{text}")
    RECORDED.write_text("".join(lines), "utf-8")
    print(RECORDED.read_text("utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(record.benchmark for record in load()))
    parser.add_argument(
        "--record",
        nargs="*",
        choices=names,
        metavar="NAME",
        help=f"measure {RECORDED_RUNS} times and write the record anew; of all, or of the named: {', '.join(names)}",
    )
    options = parser.parse_args()
    if options.record is not None:
        record(options.record or names)
        return 0
    worse = judge(load())
    for sentence in worse:
        print(sentence, file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
