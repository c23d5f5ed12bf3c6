"""The wrapper stays small: the benchmark's measurements, shorter, and with bounds that a busy machine keeps too."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import wrapper


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"START_S": 2.0, "MEASURE_S": 6.0, "CHANGES": 4, "SUSPENDS": 3}.items():
        monkeypatch.setattr(wrapper, name, value)


def test_memory_and_cpu_time(tmp_path: Path) -> None:
    found = wrapper.costs(tmp_path)
    assert found["rss_mb"] <= 21.5
    assert found["tree_cpu_s_per_min"] <= 0.4


def test_the_finish_file_follows_at_once(tmp_path: Path) -> None:
    assert min(wrapper.task_times(tmp_path)[1] for _ in range(3)) <= 1


def test_the_client_sees_a_change_soon(tmp_path: Path) -> None:
    assert wrapper.status_delay(tmp_path)["status_p50_s"] <= 3


def test_a_suspended_task_stands_still_soon(tmp_path: Path) -> None:
    assert wrapper.suspend_delay(tmp_path)["suspend_p50_s"] <= 3
