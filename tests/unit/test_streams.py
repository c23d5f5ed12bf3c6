"""Output files: whatever a host agent had written when it was killed, the next one goes on at the right byte."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent import streams
from host_agent.streams import OutputGap, OutputStream, SpoolStream


def test_a_repeat_adds_nothing_and_an_overlap_its_new_part(tmp_path: Path) -> None:
    stream = OutputStream(str(tmp_path / "out"), 0)
    assert stream.take(0, b"abc") == b"abc"
    assert stream.take(0, b"abc") == b""
    assert stream.take(1, b"bcde") == b"de"
    assert (tmp_path / "out").read_bytes() == b"abcde"


def test_a_gap_is_refused(tmp_path: Path) -> None:
    stream = OutputStream(str(tmp_path / "out"), 0)
    with pytest.raises(OutputGap, match="between bytes 0 and 3"):
        stream.take(3, b"x")


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=12), st.integers(0, 12), st.binary(max_size=9))
def test_another_agent_goes_on_where_the_file_ends(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], killed_after: int, before: bytes
) -> None:
    path = tmp_path_factory.mktemp("streams") / "out"
    path.write_bytes(before)
    whole, offset = b"".join(pieces), 0
    stream = OutputStream(str(path), len(before))
    for number, piece in enumerate(pieces):
        if number == killed_after:
            stream.close()  # a process that ends has no open files
            stream = OutputStream(str(path), len(before))
            assert stream.have == offset
        stream.take(offset, piece)
        offset += len(piece)
    stream.close()
    assert path.read_bytes() == before + whole


@given(st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=20), st.data())
def test_a_spool_keeps_the_end_and_knows_what_it_dropped(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], data: st.DataObject
) -> None:
    stem = tmp_path_factory.mktemp("spool") / "c-1.stdout"
    whole = b"".join(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "SPOOL_MOST", 100)
        stream = SpoolStream(str(stem), fresh=True)
        offset = 0
        for piece in pieces:
            if data.draw(st.booleans()):
                stream.close()
                stream = SpoolStream(str(stem))
            assert stream.have == offset
            stream.take(offset, piece)
            offset += len(piece)
        assert stream.path.stat().st_size <= 100
        start = data.draw(st.integers(0, len(whole)))
        replayed = list(stream.replay(start))
        if replayed:
            assert b"".join(piece for _, piece in replayed) == whole[replayed[0][0] :]
        assert len(list(stem.parent.iterdir())) == 1
    stream.forget()
    assert not list(stem.parent.iterdir())


def test_what_was_undone_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"before ")
    stream = OutputStream(str(path), 7)
    stream.take(0, b"kept and undone")
    stream.cut(4)
    assert path.read_bytes() == b"before kept"
    assert stream.take(4, b" anew") == b" anew"
    assert path.read_bytes() == b"before kept anew"
