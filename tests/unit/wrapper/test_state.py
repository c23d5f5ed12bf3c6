"""State files: what is read back is what was written, or nothing; wherever a write was cut off, whatever a disk did."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent.wrapper import checkpoint as checkpoints
from host_agent.wrapper.checkpoint import CHECKPOINT_FILE, Checkpoint, read_checkpoint, write_checkpoint
from host_agent.wrapper.state import STATE_FILE, CommandRecord, State, StateFile, read_state, state_text

SECONDS = st.integers(0, 10**12).map(lambda number: number / 10**6)
CHECKPOINTS = st.builds(Checkpoint, st.integers(0, 10**6), SECONDS, SECONDS)
SIZES = st.dictionaries(st.sampled_from(["stdout", "stderr"]), st.integers(0, 2**40))
RECORDS = st.builds(
    CommandRecord,
    task=st.integers(1, 99),
    vm=st.text(max_size=20),
    instance=st.text(max_size=20),
    command=st.text(max_size=20),
    asked=st.booleans(),
    output_starts=SIZES,
    output_kept=SIZES,
    output_copied=SIZES,
    agent=st.text(max_size=20),
    cpu_s=SECONDS,
    cpu_before_s=SECONDS,
)
STATES = st.builds(
    State,
    commands=st.lists(RECORDS, max_size=3).map(tuple),
    group_done=st.lists(st.integers(1, 99), max_size=3).map(tuple),
    ran_s=st.dictionaries(st.sampled_from(["1", "2"]), SECONDS),
    temporary_exits=st.integers(0, 100),
    trickle_s=st.none() | SECONDS,
    trickles=st.integers(0, 10**6),
    end_early=st.booleans(),
)


@pytest.fixture(scope="module")
def slot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slot")


@given(CHECKPOINTS, st.data())
def test_a_checkpoint_is_whole_or_not_there(slot: Path, value: Checkpoint, data: st.DataObject) -> None:
    write_checkpoint(slot, value)
    assert read_checkpoint(slot) == value
    content = (slot / CHECKPOINT_FILE).read_bytes()
    (slot / CHECKPOINT_FILE).write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert read_checkpoint(slot) is None
    (slot / CHECKPOINT_FILE).write_bytes(b"\0" * len(content))  # what some file systems leave of a new file
    assert read_checkpoint(slot) is None


@given(STATES, st.data())
def test_a_state_is_whole_or_not_there(slot: Path, value: State, data: st.DataObject) -> None:
    path = slot / STATE_FILE
    content = state_text(value).encode()
    path.write_bytes(content)
    assert read_state(path) == value
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert read_state(path) is None
    place = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    assert read_state(path) is None


@pytest.mark.parametrize("text", ["", "1\n", "1 2.5 x\n", "-1 0.000000 0.000000\n", "1 nan nan\n", "1 inf 0.000000\n"])
def test_checkpoints_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / CHECKPOINT_FILE).write_text(text)
    assert read_checkpoint(tmp_path) is None


def test_a_checkpoint_of_boincs_own_wrapper(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT_FILE).write_text("2 12.250000 300.000000\n")
    assert read_checkpoint(tmp_path) == Checkpoint(2, 12.25, 300.0)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    write_checkpoint(tmp_path, Checkpoint(1, 1.0, 1.0))
    state = StateFile(tmp_path)
    state.change(trickles=1)

    class PowerCut(BaseException):
        pass

    def cut(*_args: object, **_more: object) -> None:
        raise PowerCut

    owner: object = os if call == "fsync" else Path
    monkeypatch.setattr(owner, call, cut)
    with pytest.raises(PowerCut):
        write_checkpoint(tmp_path, Checkpoint(2, 2.0, 2.0))
    with pytest.raises(PowerCut):
        state.change(trickles=2)
    assert read_checkpoint(tmp_path) == Checkpoint(1, 1.0, 1.0)
    assert StateFile(tmp_path).state == State(trickles=1)


def test_the_name_of_a_new_file_is_on_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(checkpoints, "sync_directory", synced.append)
    StateFile(tmp_path).change(end_early=True)
    assert synced == [tmp_path]


def test_what_does_not_change_is_not_written(tmp_path: Path) -> None:
    StateFile(tmp_path).change(temporary_exits=0)
    assert not (tmp_path / STATE_FILE).exists()
