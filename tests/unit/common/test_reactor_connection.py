"""How bytes from a broker become frames, however they are cut; the connection itself: `test_broker_link.py`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import reactor_connection
from common.reactor_connection import FrameBuffer

BODIES = st.one_of(st.binary(max_size=60), st.sampled_from([b"", b"\0", b"\n\n", b"\0\n\0", b"content-length:3\n\n"]))


def frame(body: bytes, line: bytes = b"\n") -> bytes:
    lines = [b"MESSAGE", b"subscription:0", b"content-length:%d" % len(body), b"x:y", b"", b""]
    return line.join(lines) + body


@given(st.lists(st.tuples(BODIES, st.sampled_from([b"\n", b"\r\n"])), max_size=8), st.data())
def test_frames_come_whole_however_they_are_cut(bodies: list[tuple[bytes, bytes]], data: st.DataObject) -> None:
    wire = b"".join(
        frame(body, line) + b"\0" + data.draw(st.sampled_from([b"", b"\n", b"\r\n\n"])) for body, line in bodies
    )
    buffer, found = FrameBuffer(), []
    while wire:
        size = data.draw(st.integers(1, 40))
        buffer.feed(wire[:size])
        wire = wire[size:]
        while (one := buffer.next()) is not None:
            found.append(one)
    assert found == [(frame(body, line), len(frame(body, line)) - len(body)) for body, line in bodies]


def test_without_a_length_a_frame_ends_at_its_nul() -> None:
    buffer = FrameBuffer()
    buffer.feed(b"\nRECEIPT\nreceipt-id:1\n\n\0ERROR\nmessage:no\n\nask the op")
    assert buffer.next() == (b"RECEIPT\nreceipt-id:1\n\n", 22)
    assert buffer.next() is None
    buffer.feed(b"erator\0")
    assert buffer.next() == (b"ERROR\nmessage:no\n\nask the operator", 18)


@pytest.mark.parametrize("start", [b"MESSAGE\nx:", b"MESSAGE\n\n", b"MESSAGE\ncontent-length:999999999\n\n"])
def test_a_frame_without_an_end_is_too_large_at_some_time(monkeypatch: pytest.MonkeyPatch, start: bytes) -> None:
    monkeypatch.setattr(reactor_connection, "MOST_FRAME", 10_000)
    buffer = FrameBuffer()
    buffer.feed(start)
    fed = 0
    with pytest.raises(OverflowError):
        while fed < 30_000:
            buffer.feed(b"x" * 1000)
            fed += 1000
            assert buffer.next() is None
    assert fed <= 11_000
