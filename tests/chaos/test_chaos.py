"""The chaos run's short form; `make chaos` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from .chaos import KINDS, Chaos, Plan


@pytest.mark.parametrize("broker", ["embedded", "activemq", "rabbitmq"])
def test_nothing_is_lost_run_twice_corrupt_or_left_over(tmp_path: Path, broker: str) -> None:
    plan = Plan(broker, commands=150, copies=30, kills=15, seed=20)
    assert Chaos(plan, tmp_path, print).run() == []


def test_nothing_at_all_is_lost_while_the_guests_programs_are_left_alone(tmp_path: Path) -> None:
    kinds = tuple(kind for kind in KINDS if kind in ("host", "guest"))
    plan = Plan("embedded", commands=150, copies=30, kills=15, seed=7, kinds=kinds)
    run = Chaos(plan, tmp_path, print)
    assert run.run() == []
    assert run.lost == 0
