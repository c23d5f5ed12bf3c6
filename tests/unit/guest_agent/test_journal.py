"""The journal: what was written is there after any end of the process, and half a line harms nothing."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import line_log
from guest_agent import journal
from guest_agent.journal import Journal


def test_what_was_noted_is_there_after_a_restart(tmp_path: Path) -> None:
    first = Journal(tmp_path / "j")
    first.accepted("c-1", "k-1")
    first.accepted("c-2", "k-1")
    first.ended("c-2", {"outcome": "exited", "exit_code": 3})
    first.accepted("c-3", "k-1")
    first.ended("c-3", {"outcome": "exited", "exit_code": 0})
    first.forgotten("c-3")
    assert Journal(tmp_path / "j").commands == {"c-1": None, "c-2": {"outcome": "exited", "exit_code": 3}}


@given(cut=st.integers(0, 200))
def test_a_power_cut_in_a_line_loses_that_line_alone(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    first = Journal(path)
    first.accepted("c-1", "k-1")
    size = len(path.read_bytes().rstrip(b"\0"))
    first.ended("c-1", {"outcome": "exited"})
    first.close()
    with path.open("r+b") as file:
        file.truncate(min(path.stat().st_size, size + cut))
    with closing(Journal(path)) as again:
        assert "c-1" in again.commands
        again.accepted("c-2", "k-1")
    with closing(Journal(path)) as third:
        assert "c-2" in third.commands


def test_forgotten_commands_do_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "COMPACT_AFTER", 50)
    kept = Journal(tmp_path / "j")
    kept.accepted("c-kept", "k-1")
    for number in range(300):
        kept.accepted(f"c-{number}", "k-1")
        kept.ended(f"c-{number}", {"outcome": "exited"})
        kept.forgotten(f"c-{number}")
    assert (tmp_path / "j").stat().st_size < 20_000
    assert Journal(tmp_path / "j").commands == {"c-kept": None}


def test_which_keeper_was_going_to_run_a_command_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "COMPACT_AFTER", 1)
    first = Journal(tmp_path / "j")
    first.accepted("c-1", "k-1")
    first.accepted("c-2", "k-2")
    for _ in range(3):
        first.accepted("c-3", "k-2")
        first.forgotten("c-3")
    again = Journal(tmp_path / "j")
    assert [again.keeper_of(command) for command in ("c-1", "c-2", "c-3")] == ["k-1", "k-2", ""]


@pytest.mark.parametrize("lasting", [True, False])
def test_a_disk_that_ends_with_its_memory_need_not_be_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lasting: bool
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(line_log, "_sync", synced.append)
    journal = Journal(tmp_path / "j")
    journal.lasting = lasting
    journal.accepted("c-1", "keeper")
    journal.flush()
    assert bool(synced) is lasting
    assert Journal(tmp_path / "j").commands == {"c-1": None}, "the agent's own death it survives"
