"""The regression guard fails for what stays worse, and for nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import guard
from benchmarks.__main__ import NAMES, UNAVAILABLE, main
from benchmarks.guard import Record, band_of
from benchmarks.peers.packages import Unavailable

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


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    file = tmp_path / "recorded.toml"
    file.write_text('[one.speed]\nvalue = 1.0\nband = 1.0\nbetter = "more"\n\n[two.ratio]\nvalue = 3.0\nband = 0.5\n')
    monkeypatch.setattr(guard, "RECORDED", file)
    return file


def test_a_record_is_the_median_of_its_runs_and_its_band_reaches_the_farthest(
    monkeypatch: pytest.MonkeyPatch, recorded: Path
) -> None:
    play(monkeypatch, one=[{"speed": speed, "other": 1.0} for speed in (4.0, 5.0, 6.0, 8.0, 5.5)])
    guard.record(["one"])
    assert guard.load(recorded) == [
        Record("one", "speed", 5.5, 2.5, more_is_better=True),
        Record("two", "ratio", 3.0, 0.5),
    ]
    assert "runs = [4.0, 5.0, 6.0, 8.0, 5.5]" in recorded.read_text()


def test_a_metric_is_added_by_its_name(monkeypatch: pytest.MonkeyPatch, recorded: Path) -> None:
    play(monkeypatch, two=[{"ratio": 9.0, "cpu": 2.0}] * 5, three=[{"cpu": 4.0}] * 5)
    guard.record(["two.cpu", "three.cpu"])
    assert guard.load(recorded)[1:] == [
        Record("two", "ratio", 3.0, 0.5),
        Record("two", "cpu", 2.0, 0.2),
        Record("three", "cpu", 4.0, 0.4),
    ]
    play(monkeypatch, two=[{"ratio": 9.0, "cpu": 2.0}] * 5)
    with pytest.raises(SystemExit, match="the short form of two has no 'cqu'; it has ratio, cpu"):
        guard.record(["two.cqu"])


def test_a_run_on_a_busy_machine_widens_the_band_and_leaves_the_value(
    monkeypatch: pytest.MonkeyPatch, recorded: Path
) -> None:
    play(monkeypatch, two=[{"ratio": ratio} for ratio in (3.0, 3.1, 2.9, 3.0, 3.0, 5.0, 1.0)])
    guard.record(["two"])
    for _ in range(2):
        guard.record(["two"], loaded=True)
    assert guard.load(recorded)[1] == Record("two", "ratio", 3.0, 1.0)
    assert "loaded = [5.0, 1.0]" in recorded.read_text()
    play(monkeypatch, two=[{"ratio": 3.0}] * 5)
    guard.record(["two"])
    assert guard.load(recorded)[1] == Record("two", "ratio", 3.0, 1.0), "what busy machines have shown stays"


def test_only_benchmarks_can_be_recorded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["guard", "--record", "copie.large"])
    with pytest.raises(SystemExit):
        guard.main()
    assert "there is no benchmark 'copie'" in capsys.readouterr().err


def test_what_looks_worse_is_measured_again_after_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def run(name: str, deadline: float) -> dict[str, float]:
        order.append(name)
        return {"ratio": 9.0, "lost": 0.0}

    monkeypatch.setattr(guard, "measure", run)
    assert len(guard.judge(RECORDS)) == 2
    assert order == ["one", "two", "one", "one", "two", "two"]


def test_what_is_too_slow_to_be_measured_judges_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = iter([{"ratio": 9.0, "lost": 0.0}])

    def slow(name: str, deadline: float) -> dict[str, float]:
        if name == "two":
            raise guard.NotMeasured("it did not end")
        for run in left:
            return run
        raise guard.NotMeasured("it did not end again")

    monkeypatch.setattr(guard, "measure", slow)
    assert guard.judge(RECORDS) == []
    said = capsys.readouterr().out
    assert "two              not measured: it did not end\n" in said
    assert "one              not measured: it did not end again\n" in said
    with pytest.raises(guard.NotMeasured, match="did not end in 0 s"):
        MEASURE("roundtrip_local", deadline=0.3)


def test_all_runs_together_have_a_bound(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now, given = [0.0], []

    def run(name: str, deadline: float) -> dict[str, float]:
        given.append(deadline)
        now[0] += min(100.0, deadline)
        return {"ratio": 9.0}

    monkeypatch.setattr(guard, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(guard, "measure", run)
    monkeypatch.setattr(guard, "MOST_SECONDS", 350.0)
    # Two are measured, the first of them twice more; for the second nothing is left.
    assert len(guard.judge([Record(name, "ratio", 1.0, 0.1) for name in ("one", "two")])) == 1
    assert given == [120.0, 120.0, 120.0, 50.0]
    assert (
        "two              not measured: this machine is too busy, the others have taken 350 s"
        in capsys.readouterr().out
    )


def test_what_this_machine_lacks_something_for_judges_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho one >&2\necho 'no packages here' >&2\nexit {UNAVAILABLE}\n")
    program.chmod(0o755)
    monkeypatch.setattr(guard, "sys", SimpleNamespace(executable=str(program)))
    with pytest.raises(guard.NotMeasured, match=r"^no packages here$"):
        MEASURE("roundtrip")


def test_a_benchmark_that_cannot_run_here_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> dict[str, float]:
        raise Unavailable("its image cannot be built:\n no packages")

    monkeypatch.setattr("benchmarks.roundtrip.run", run)
    monkeypatch.setattr("sys.argv", ["benchmarks", "roundtrip"])
    assert main() == UNAVAILABLE
    assert capsys.readouterr().err == "roundtrip cannot be measured: its image cannot be built: no packages\n"


@pytest.mark.parametrize(("accelerator", "measured"), [("KVM", ["one"]), ("emulated (TCG)", ["one", "copy"])])
def test_ratios_of_emulated_machines_are_not_those_of_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], accelerator: str, measured: list[str]
) -> None:
    done: list[str] = []

    def run(name: str, deadline: float) -> dict[str, float]:
        done.append(name)
        return {"ratio": 1.0}

    monkeypatch.setattr(guard, "measure", run)
    monkeypatch.setattr(guard, "accelerator", lambda: accelerator)
    assert guard.judge([Record(name, "ratio", 1.0, 0.1) for name in ("one", "copy")]) == []
    assert done == measured
    assert ("copy             not measured" in capsys.readouterr().out) == (accelerator == "KVM")


def test_a_benchmark_that_fails_says_its_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the benchmark no-such failed:"):
        guard.measure("no-such")


def test_a_recorded_metric_that_is_not_told_any_more_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, one=[{"ratio": 2.0}], two=[{"ratio": 1.0}])
    with pytest.raises(RuntimeError, match="the short form of one tells no lost any more"):
        guard.judge(RECORDS)


def test_the_record_can_be_read_and_names_benchmarks() -> None:
    records = guard.load()
    assert {record.benchmark for record in records} <= set(NAMES)
    assert all(record.band >= 0 for record in records)


def test_a_band_allows_what_busy_machines_have_measured() -> None:
    assert band_of(10.0, [9.0, 10.0, 10.5], []) == 1.0
    assert band_of(10.0, [9.0, 10.0, 13.0], []) == 3.0
    assert band_of(10.0, [10.0], [2.0]) == 1.0, "faster is not worse"
    assert band_of(10.0, [10.0], [2.0], more_is_better=True) == 4.0
    record = Record("b", "m", 10.0, band_of(10.0, [9.0, 10.0, 10.5], [12.0, 18.0]))
    assert record.allows(18.0) and not record.allows(18.1)


def test_what_is_recorded_of_other_processors_alone_is_shown_and_judges_nobody(
    monkeypatch: pytest.MonkeyPatch, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = "value = 1.0\nband = 0.1\n"
    (recorded.parent / "another.toml").write_text(f"[two.ratio]\n{entry}[two.old]\n{entry}[three.cpu]\n{entry}")
    others = guard.load_others(recorded.parent, guard.load(recorded))
    assert others == {"three": ["cpu"], "two": ["old"]}
    play(monkeypatch, one=[{"speed": 1.0}], two=[{"ratio": 3.0}], three=[{"cpu": 99.0}])
    assert guard.judge(guard.load(recorded), others) == []
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines if "no record" in line] == [["three", "cpu", "99.00"]]


def test_a_processor_without_any_record(monkeypatch: pytest.MonkeyPatch, recorded: Path) -> None:
    monkeypatch.setattr(guard, "RECORDED", recorded.with_name("new.toml"))
    play(monkeypatch, one=[{"speed": 2.0}] * 5, two=[{"ratio": 3.0}] * 5)
    guard.record([])
    assert {(each.benchmark, each.value) for each in guard.load(recorded.with_name("new.toml"))} == {
        ("one", 2.0), ("two", 3.0),
    }  # fmt: skip
