"""The regression guard fails for what stays worse, and for nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import guard
from benchmarks.guard import Record

RECORDS = [Record("one", "ratio", 2.0, 0.5), Record("one", "lost", 0.0, 0.0), Record("two", "ratio", 1.0, 0.1)]


def play(monkeypatch: pytest.MonkeyPatch, **runs: list[dict[str, float]]) -> dict[str, Iterator[dict[str, float]]]:
    """Each benchmark gives these values, run after run; running it more often is an error."""
    left = {name: iter(values) for name, values in runs.items()}
    monkeypatch.setattr(guard, "measure", lambda name: next(left[name]))
    return left


def test_values_within_twice_their_band_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    left = play(monkeypatch, one=[{"ratio": 3.0, "lost": 0}], two=[{"ratio": 0.2}])
    assert guard.judge(RECORDS) == []
    assert not any(list(rest) for rest in left.values())


def test_one_bad_run_of_three_is_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [{"ratio": 9.0, "lost": 0.0}, {"ratio": 2.1, "lost": 0.0}, {"ratio": 1.9, "lost": 0.0}]
    play(monkeypatch, one=runs, two=[{"ratio": 1.0}])
    assert guard.judge(RECORDS) == []


def test_a_median_that_is_worse_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [{"ratio": 9.0, "lost": 0.0}, {"ratio": 3.1, "lost": 0.0}, {"ratio": 1.9, "lost": 0.0}]
    play(monkeypatch, one=runs, two=[{"ratio": 1.0}])
    assert guard.judge(RECORDS) == ["one: ratio was 2.00 ± 0.50 and is 3.10, median of 3"]


def test_what_must_be_nought(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, one=[{"ratio": 2.0, "lost": 1.0}] * 3, two=[{"ratio": 1.0}])
    assert guard.judge(RECORDS) == ["one: lost was 0.00 ± 0.00 and is 1.00, median of 3"]


def test_a_benchmark_that_fails_says_its_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the benchmark no-such failed:"):
        guard.measure("no-such")


def test_the_record_can_be_read_and_names_benchmarks() -> None:
    from benchmarks.__main__ import NAMES

    records = guard.load()
    assert {record.benchmark for record in records} <= set(NAMES)
    assert all(record.band >= 0 for record in records)
