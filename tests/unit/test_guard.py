"""The regression guard fails for what stays worse, and for nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import guard
from benchmarks.guard import Record, band_of

MEASURE = guard.measure
RECORDS = [Record("one", "ratio", 2.0, 0.5), Record("one", "lost", 0.0, 0.0), Record("two", "ratio", 1.0, 0.1)]


def play(monkeypatch: pytest.MonkeyPatch, **runs: list[dict[str, float]]) -> dict[str, Iterator[dict[str, float]]]:
    """Each benchmark gives these values, run after run; running it more often is an error."""
    left = {name: iter(values) for name, values in runs.items()}
    monkeypatch.setattr(guard, "measure", lambda name, *_: next(left[name]))
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


def test_of_some_values_more_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [Record("one", "speed", 10.0, 1.0, more_is_better=True)]
    play(monkeypatch, one=[{"speed": 90.0}])
    assert guard.judge(records) == []
    play(monkeypatch, one=[{"speed": 7.9}] * 3)
    assert guard.judge(records) == ["one: speed was 10.00 ± 1.00 and is 7.90, median of 3"]


def test_a_record_is_the_median_of_its_runs_and_its_band_reaches_the_farthest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "recorded.toml"
    file.write_text('[one.speed]\nvalue = 1.0\nband = 1.0\nbetter = "more"\n\n[two.ratio]\nvalue = 3.0\nband = 0.5\n')
    monkeypatch.setattr(guard, "RECORDED", file)
    play(monkeypatch, one=[{"speed": speed} for speed in (4.0, 5.0, 6.0, 8.0, 5.5)])
    guard.record(["one"])
    assert guard.load(file) == [Record("one", "speed", 5.5, 2.5, more_is_better=True), Record("two", "ratio", 3.0, 0.5)]
    assert "runs = [4.0, 5.0, 6.0, 8.0, 5.5]" in file.read_text()


def test_what_is_too_slow_to_be_measured_judges_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(name: str) -> dict[str, float]:
        raise guard.TooSlow(f"{name} did not end")

    monkeypatch.setattr(guard, "measure", slow)
    assert guard.judge(RECORDS) == []
    assert "one did not end" in capsys.readouterr().out
    with pytest.raises(guard.TooSlow, match="roundtrip_local did not end in 0 s"):
        MEASURE("roundtrip_local", deadline=0.3)


def test_a_benchmark_that_fails_says_its_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the benchmark no-such failed:"):
        guard.measure("no-such")


def test_the_record_can_be_read_and_names_benchmarks() -> None:
    from benchmarks.__main__ import NAMES

    records = guard.load()
    assert {record.benchmark for record in records} <= set(NAMES)
    assert all(record.band >= 0 for record in records)


def test_a_band_allows_what_busy_machines_have_measured() -> None:
    assert band_of(10.0, [9.0, 10.0, 10.5], []) == 1.0
    assert band_of(10.0, [9.0, 10.0, 13.0], []) == 3.0
    record = Record("b", "m", 10.0, band_of(10.0, [9.0, 10.0, 10.5], [12.0, 18.0]))
    assert record.allows(18.0) and not record.allows(18.1)
