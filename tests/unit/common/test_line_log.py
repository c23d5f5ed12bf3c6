"""The file of lines: what was flushed is there after a power cut, whatever that left behind it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import line_log
from common.line_log import ROOM, LineLog

SECTOR = 512


def entries(path: Path) -> list[dict[str, Any]]:
    log = LineLog(path)
    log.close()
    return log.entries


def test_lines_are_written_over_zeros_and_the_file_rarely_grows(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = LineLog(path)
    sizes = set()
    for number in range(3000):
        log.append({"n": number}, flush=False)
        sizes.add(path.stat().st_size)
    assert 1 < len(sizes) <= 4
    assert [entry["n"] for entry in LineLog(path).entries] == list(range(3000))  # as after a kill
    log.close()
    assert path.read_bytes().endswith(b"}\n")
    assert [entry["n"] for entry in entries(path)] == list(range(3000))


@given(st.lists(st.integers(0, 400), min_size=1, max_size=20), st.data())
def test_a_power_cut_takes_no_line_that_was_flushed(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], data: st.DataObject
) -> None:
    """The disk has written any of the sectors that were changed since the last flush, and not the others."""
    path = tmp_path_factory.mktemp("log") / "l"
    log = LineLog(path)
    flushed = data.draw(st.integers(0, len(lengths)))
    for number, length in enumerate(lengths[:flushed]):
        log.append({"n": number, "x": "x" * length})
    before = path.read_bytes()
    for number, length in enumerate(lengths[flushed:], flushed):
        log.append({"n": number, "x": "x" * length}, flush=False)
    after = path.read_bytes()
    cut = bytearray(after)
    for start in range(0, len(after), SECTOR):
        if data.draw(st.booleans()):
            cut[start : start + SECTOR] = before[start : start + SECTOR].ljust(SECTOR, b"\0")[: len(after) - start]
    path.write_bytes(cut)
    again = LineLog(path)
    assert [entry["n"] for entry in again.entries][:flushed] == list(range(flushed))
    again.append({"n": -1})
    assert entries(path)[-1] == {"n": -1}


def test_one_flush_is_enough_for_many_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushes: list[int] = []
    monkeypatch.setattr(line_log, "_sync", flushes.append)
    log = LineLog(tmp_path / "log")
    for number in range(10):
        log.append({"n": number}, flush=False)
    assert not flushes
    log.flush()
    log.flush()
    assert len(flushes) == 1
    log.append({"n": 10})
    assert len(flushes) == 2


def test_a_full_disk_loses_the_line_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    log = LineLog(path)
    log.append({"n": 0})
    write, room = os.write, path.stat().st_size + 10

    def full(descriptor: int, data: bytes) -> int:
        left = room - os.lseek(descriptor, 0, os.SEEK_CUR)
        return write(descriptor, data[: max(0, left)])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        number = 0
        with pytest.raises(OSError, match="No space"):
            for number in range(1, ROOM):
                log.append({"n": number})
    lost = number
    log.append({"n": "after"})
    assert [entry["n"] for entry in entries(path)] == [*range(lost), "after"]


def test_a_file_without_zeros_goes_on(tmp_path: Path) -> None:
    """One of an earlier version, with half a line at its end."""
    path = tmp_path / "log"
    path.write_bytes(b'{"n": 1}\n{"n": 2}\n{"n":')
    log = LineLog(path)
    assert [entry["n"] for entry in log.entries] == [1, 2]
    log.append({"n": 3})
    log.close()
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [1, 2, 3]
