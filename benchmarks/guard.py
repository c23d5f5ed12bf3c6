"""The regression guard: short forms of benchmarks, their ratios beside what `recorded/` has, and a verdict.

    python -m benchmarks.guard              # three minutes, never more than ten; CI runs it
    python -m benchmarks.guard --record     # write what is measured now, after a change that is meant to be one
    python -m benchmarks.guard --record broker copy     # of these benchmarks alone
    python -m benchmarks.guard --record copy.large_in_mb_s    # of this metric alone, also of one that is not there yet
    python -m benchmarks.guard --loaded copy            # on a busy machine: one run more that is not to be blamed

What is looked at: ratios to something that was measured in the same run, of CPU time to CPU time where there is such a
one, memory, and counts that must be nought. Everything is measured once; what is worse than its record by more than
twice its noise band is then measured twice more, and only if the median of the three is still so much worse does the
guard fail: one that cries wolf is worse than none. Values are of a quiet machine; `loaded` are runs on busy ones, and
bands reach so far that these would not be blamed. So what does not end in its time because the machine is busy, what
this machine lacks something for, and where there is KVM what was recorded without, is named and judges nobody. Each
maker of processors has records of its own, because their ratios differ; what has none is measured and only shown.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import attrs

from benchmarks.__main__ import NAMES, UNAVAILABLE
from benchmarks.machine import accelerator, maker

RECORDED = Path(__file__).with_name("recorded") / f"{maker()}.toml"
DEADLINE = 120.0  # seconds for one run of one benchmark; on a quiet machine `wrapper` needs 64, the others up to 30
MOST_SECONDS = 530.0  # for all runs; what does not fit in is not measured
LEAST_SECONDS = 30.0  # with less left, no other run is begun
END_DEADLINE = 60.0  # for the VMs and brokers of one that has not ended in its time
RECORD_DEADLINE = 240.0
TIMES = 3
LEAST_BAND = 0.1  # of a value: what another Python or another disk changes is no regression
RECORDED_RUNS = 5
KEYS = ("better", "value", "band", "runs", "loaded")  # of an entry, as they are written
EMULATED = ("vm_start", "checkpoint", "copy", "roundtrip")  # with KVM all their ratios are others


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
    tables = _tables(file)
    return [
        Record(benchmark, metric, float(entry["value"]), float(entry["band"]), entry.get("better") == "more")
        for benchmark, metrics in tables.items()
        for metric, entry in metrics.items()
    ]


def load_others(folder: Path, records: list[Record]) -> dict[str, list[str]]:
    """Of other makers' processors alone: benchmarks, and their metrics."""
    here = {(record.benchmark, record.metric) for record in records}
    found: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*.toml")):
        for other in load(file):
            if (other.benchmark, other.metric) not in here:
                here.add((other.benchmark, other.metric))
                found.setdefault(other.benchmark, []).append(other.metric)
    return found


def _tables(file: Path) -> dict[str, dict[str, dict[str, Any]]]:
    return tomllib.loads(file.read_text("utf-8")) if file.exists() else {}


class NotMeasured(Exception):
    """A benchmark that did not end in its time, or cannot run here: a sentence, which is no verdict."""


def measure(benchmark: str, deadline: float = DEADLINE) -> dict[str, float]:
    """One short run, in a process of its own. Raises NotMeasured."""
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
                raise NotMeasured(f"this machine is too busy, it did not end in {deadline:.0f} s") from None
        said = words.read_text("utf-8", "replace")
        if run.returncode == UNAVAILABLE:
            raise NotMeasured(said.splitlines()[-1])
        if run.returncode:
            raise RuntimeError(f"the benchmark {benchmark} failed:\n{said[-3000:]}")
        metrics: dict[str, float] = json.loads(file.read_text("utf-8"))["metrics"]
        return metrics


def judge(records: list[Record], others: Mapping[str, Sequence[str]] | None = None) -> list[str]:
    """Measure and print, also `others`, which have no record here; sentences about what has become worse."""
    print(f"{'benchmark':16} {'metric':32} {'now':>9} {'recorded':>9} {'band':>7}")
    until = time.monotonic() + MOST_SECONDS
    doubtful: dict[str, list[dict[str, float]]] = {}
    of = {each.benchmark: [record for record in records if record.benchmark == each.benchmark] for each in records}
    for benchmark, its in of.items():
        runs = _runs(benchmark, 1, until)
        if gone := [record.metric for record in its if any(record.metric not in run for run in runs)]:
            raise RuntimeError(f"the short form of {benchmark} tells no {', '.join(gone)} any more")
        if not all(record.allows(run[record.metric]) for run in runs for record in its):
            doubtful[benchmark] = runs
            print(f"{benchmark:16} looks worse and is measured again below", flush=True)
        elif runs:
            for record in its:
                _verdict(record, [run[record.metric] for run in runs])
    for benchmark, metrics in (others or {}).items():
        for run in [] if benchmark in of else _runs(benchmark, 1, until):
            for metric in metrics:
                now = f"{run[metric]:9.2f}" if metric in run else f"{'gone':>9}"
                print(f"{benchmark:16} {metric:32} {now}  no record of a processor by {maker()}", flush=True)
    worse = []
    for benchmark, runs in doubtful.items():
        if more := _runs(benchmark, TIMES - 1, until):
            worse += [_verdict(record, [run[record.metric] for run in runs + more]) for record in of[benchmark]]
    return [sentence for sentence in worse if sentence]


def _runs(benchmark: str, count: int, until: float) -> list[dict[str, float]]:
    """So many runs, or none; it is said why."""
    try:
        if benchmark in EMULATED and accelerator() == "KVM":
            raise NotMeasured("its record is of emulated VMs, and here is KVM")
        runs = []
        for _ in range(count):
            left = until - time.monotonic()
            if left < LEAST_SECONDS:
                raise NotMeasured(f"this machine is too busy, the others have taken {MOST_SECONDS - left:.0f} s")
            runs.append(measure(benchmark, min(DEADLINE, left)))
        return runs
    except NotMeasured as reason:
        print(f"{benchmark:16} not measured: {reason}", flush=True)
        return []


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


def band_of(value: float, runs: list[float], loaded: list[float], *, more_is_better: bool = False) -> float:
    """As far as its runs, and half as far as the worst of busy machines: twice is allowed."""
    farthest = max(abs(run - value) for run in runs)
    busy = max(((value - run if more_is_better else run - value) / 2 for run in loaded), default=0.0)
    return round(max(farthest, busy, LEAST_BAND * value), 3)


def record(names: list[str], *, loaded: bool = False) -> None:
    """Measure and write the record anew, or with `loaded` one run besides it; all else stays as it is.

    A name is a benchmark's, for all that is recorded of it, or BENCHMARK.METRIC.
    """
    tables = _tables(RECORDED)
    others = load_others(RECORDED.parent, load(RECORDED))
    wanted: dict[str, list[str]] = {}
    for name in names or [*tables, *others]:
        benchmark, _, metric = name.partition(".")
        known = tables.get(benchmark) or others.get(benchmark, [])
        wanted.setdefault(benchmark, []).extend([metric] if metric else known)
    for benchmark, metrics in wanted.items():
        runs = [measure(benchmark, RECORD_DEADLINE) for _ in range(1 if loaded else RECORDED_RUNS)]
        for metric in dict.fromkeys(metrics):
            if metric not in runs[0]:
                raise SystemExit(f"the short form of {benchmark} has no {metric!r}; it has {', '.join(runs[0])}")
            entry = tables.setdefault(benchmark, {}).setdefault(metric, {})
            values = [round(run[metric], 3) for run in runs]
            if loaded:
                entry["loaded"] = entry.get("loaded", []) + values
                values = entry.get("runs", values)
            entry |= {"value": median(values), "band": 0.0, "runs": values}
            entry["band"] = band_of(
                entry["value"], values, entry.get("loaded", []), more_is_better=entry.get("better") == "more"
            )
        _write(tables)  # a benchmark's five runs are not lost when another one fails
    print(RECORDED.read_text("utf-8"))


def _write(tables: dict[str, dict[str, dict[str, Any]]]) -> None:
    lines = ["# What benchmarks/guard.py compares with; `python -m benchmarks.guard --record` writes it.\n"]
    lines += ['# Of a metric of which more is better, `better = "more"` is added by hand.\n']
    for benchmark, metrics in tables.items():
        for metric, entry in metrics.items():
            # JSON's texts, numbers and lists are TOML's, too.
            text = "".join(f"{key} = {json.dumps(entry[key])}\n" for key in KEYS if key in entry)
            lines.append(f"\n[{benchmark}.{metric}]\n{text}")
    RECORDED.write_text("".join(lines), "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    for option, what in (
        ("--record", f"measure {RECORDED_RUNS} times and write the record anew"),
        ("--loaded", "measure once on a busy machine, and widen the bands as far as that"),
    ):
        which.add_argument(
            option,
            nargs="*",
            type=_name,
            metavar="NAME",
            help=f"{what}; of all that is recorded, or of benchmarks, or of single metrics: BENCHMARK.METRIC",
        )
    options = parser.parse_args()
    if options.record is not None or options.loaded is not None:
        try:
            record(options.record or options.loaded or [], loaded=options.loaded is not None)
        except NotMeasured as reason:
            raise SystemExit(f"it is not recorded: {reason}") from None
        return 0
    records = load()
    worse = judge(records, load_others(RECORDED.parent, records))
    for sentence in worse:
        print(sentence, file=sys.stderr)
    return 1 if worse else 0


def _name(text: str) -> str:
    if text.partition(".")[0] not in NAMES:
        raise argparse.ArgumentTypeError(f"there is no benchmark {text.partition('.')[0]!r}")
    return text


if __name__ == "__main__":
    sys.exit(main())
