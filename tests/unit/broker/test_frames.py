"""The STOMP codec: whole frames from any segments, and bounds on everything hostile."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent.broker.frames import Frame, FrameError, FrameParser, KnownHeads, encode, escape
from host_agent.broker.limits import FrameLimits

LIMITS = FrameLimits()
SMALL = FrameLimits(command_bytes=16, header_count=4, header_line_bytes=64, header_bytes=128, body_bytes=256)

header_text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
names = header_text.filter(lambda name: name not in ("", "content-length"))
frames = st.builds(
    Frame,
    st.sampled_from(["SEND", "MESSAGE", "ACK", "STOMP"]),
    st.dictionaries(names, header_text, max_size=6),
    st.binary(max_size=300),
)


def parse(data: bytes, limits: FrameLimits = LIMITS) -> list[Frame]:
    return parse_segments([data], limits)


def parse_segments(segments: list[bytes], limits: FrameLimits = LIMITS) -> list[Frame]:
    parser = FrameParser(limits)
    found = []
    for segment in segments:
        parser.feed(segment)
        while (frame := parser.next_frame()) is not None:
            found.append(frame)
    return found


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:stop] for start, stop in itertools.pairwise(edges)]


@given(
    st.lists(frames, max_size=5),
    st.lists(st.integers(0, 10_000), max_size=12),
    st.sampled_from([b"", b"\n", b"\r\n\n"]),
)
def test_round_trip_under_any_segmentation(sent: list[Frame], places: list[int], gap: bytes) -> None:
    data = b"".join(gap + encode(frame.command, frame.headers, frame.body) for frame in sent)
    received = parse_segments(cut(data, places))
    assert [(frame.command, frame.body) for frame in received] == [(frame.command, frame.body) for frame in sent]
    for frame, original in zip(received, sent, strict=True):
        headers = {name: value for name, value in frame.headers.items() if name != "content-length"}
        assert headers == original.headers


@given(st.lists(frames, max_size=4))
def test_one_byte_at_a_time(sent: list[Frame]) -> None:
    data = b"".join(encode(frame.command, frame.headers, frame.body) for frame in sent)
    in_bytes = parse_segments([data[place : place + 1] for place in range(len(data))])
    assert [frame[:3] for frame in in_bytes] == [frame[:3] for frame in parse(data)]


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=8))
def test_garbage_is_refused_or_harmless_however_it_is_cut(data: bytes, places: list[int]) -> None:
    def outcome(segments: list[bytes]) -> list[Frame] | None:
        try:
            return parse_segments(segments, SMALL)
        except FrameError:
            return None

    whole = outcome([data])
    pieces = outcome(cut(data, places))
    # A cut may let the parser see sooner that the stream is broken, but never read other frames.
    assert pieces is None or whole is None or [frame[:3] for frame in pieces] == [frame[:3] for frame in whole]


@given(st.binary(max_size=60))
def test_plain_frames_are_those_that_need_no_escapes(value: bytes) -> None:
    try:
        [frame] = parse(b"SEND\nname:" + value + b"\n\n\0")
    except (FrameError, ValueError):
        return
    assert frame.head is not None
    if frame.head.plain:
        assert all(escape(text) == text for pair in frame.headers.items() for text in pair)


def test_first_of_repeated_headers_wins() -> None:
    [frame] = parse(b"SEND\nfoo:World\nfoo:Hello\n\n\0")
    assert frame.headers == {"foo": "World"}


def test_carriage_returns_before_line_feeds() -> None:
    [first, second] = parse(b"SEND\r\na:1\r\nb:2\r\n\r\none\n\ntwo\0\r\n\r\nACK\r\nid:3\r\n\r\n\0")
    assert (first.headers, first.body) == ({"a": "1", "b": "2"}, b"one\n\ntwo")
    assert (second.command, second.headers) == ("ACK", {"id": "3"})


def test_body_without_length_ends_at_nul_and_may_look_like_frames() -> None:
    [first, second] = parse(b"SEND\na:1\n\n\n\r\nSEND\n\n\0SEND\ncontent-length:3\n\n\0\0\0\0")
    assert first.body == b"\n\r\nSEND\n\n"
    assert second.body == b"\0\0\0"


def test_escapes_are_resolved_except_in_connect() -> None:
    lines = b"\na\\cb:\\\\ \\n \\r \\c\n\n\0"
    [send] = parse(b"SEND" + lines)
    assert send.headers == {"a:b": "\\ \n \r :"}
    [connect] = parse(b"CONNECT" + lines)
    assert connect.headers == {"a\\cb": "\\\\ \\n \\r \\c"}


def test_unescaped_colon_in_a_value_is_kept_and_escaped_on_the_way_out() -> None:
    [frame] = parse(b"SEND\nurl:http://host:80\n\n\0")
    assert frame.headers == {"url": "http://host:80"}
    assert frame.head is not None
    assert not frame.head.plain
    assert b"url:http\\c//host\\c80\n" in encode("MESSAGE", frame.headers)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"SEND\nno colon\n\n\0", "name:value"),
        (b"SEND\n:no name\n\n\0", "name:value"),
        (b"SEND\nno\\nescape\n\n\0", "name:value"),
        (b"SEND\na:\\t\n\n\0", "escape"),
        (b"SEND\na:end\\\n\n\0", "escape"),
        (b"SEND\na:\xff\n\n\0", "UTF-8"),
        (b"SEND\na:1\0SEND\n\n\0", "blank line"),
        (b"SEND\na:1\0", "blank line"),
        (b"SEND\ncontent-length:x\n\n\0", "content-length"),
        (b"SEND\ncontent-length:-1\n\n\0", "content-length"),
        (b"SEND\ncontent-length:\xc2\xb2\n\n\0", "content-length"),
        (b"SEND\ncontent-length:" + b"9" * 30 + b"\n\n\0", "content-length"),
        (b"SEND\ncontent-length:2\n\nabc\0", "content-length"),
        (b"SEND\ncontent-length:257\n\n", "256 bytes"),
        (b"SEND\n\n" + b"x" * 257, "256 bytes"),
        (b"SEND\n\n" + b"x" * 257 + b"\0", "256 bytes"),
        (b"X" * 40, "command"),
        (b"X" * 17 + b"\n\n\0", "command"),
        (b"SEND\n" + b"a:1\n" * 5 + b"\n\0", "4 headers"),
        (b"SEND\na:" + b"x" * 70 + b"\n\n\0", "64 bytes"),
        (b"SEND\n" + b"a:111111111111111111\n" * 10, "128 bytes"),
    ],
)
def test_what_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(FrameError, match=words):
        parse(data, SMALL)
    with pytest.raises(FrameError):
        parse_segments([data[place : place + 1] for place in range(len(data))], SMALL)


def test_a_declared_length_allocates_nothing() -> None:
    parser = FrameParser(FrameLimits(body_bytes=10**11))
    parser.feed(b"SEND\ncontent-length:99999999999\n\nabc")
    assert parser.next_frame() is None
    assert parser.in_frame


def test_limits_are_reached_exactly() -> None:
    assert len(parse(b"SEND\ncontent-length:256\n\n" + b"\0" * 257, SMALL)[0].body) == 256
    assert len(parse(b"SEND\n\n" + b"x" * 256 + b"\0", SMALL)[0].body) == 256
    assert len(parse(b"SEND\n" + b"a:1\n" * 4 + b"\n\0", SMALL)) == 1
    assert parse(b"S" * 16 + b"\n\n\0", SMALL)[0].command == "S" * 16


@pytest.mark.parametrize("length", [b"", b"content-length:4194304\n"])
def test_a_big_body_in_small_segments_is_not_quadratic(length: bytes) -> None:
    size = 4 * 2**20
    data = b"SEND\n" + length + b"\n" + b"x" * size + b"\0"
    parser = FrameParser(LIMITS)
    started = time.process_time()
    for place in range(0, len(data), 64):
        parser.feed(data[place : place + 64])
        frame = parser.next_frame()
    assert frame is not None
    assert len(frame.body) == size
    # Linear work takes a tenth of a second; copying the body for each segment would take minutes.
    assert time.process_time() - started < 5


def test_a_flood_of_line_ends_costs_little() -> None:
    parser = FrameParser(LIMITS)
    started = time.process_time()
    for _ in range(1_000):
        parser.feed(b"\n" * 65536)
        assert parser.next_frame() is None
    assert not parser.in_frame
    assert time.process_time() - started < 5


def test_the_encoder_refuses_what_no_frame_can_carry() -> None:
    with pytest.raises(FrameError):
        encode("SEND", {"a": "\0"})
    with pytest.raises(FrameError):
        encode("CONNECTED", {"a": "1\nb:2"})


def test_a_head_that_comes_again_is_not_parsed_again_and_says_the_same() -> None:
    known = KnownHeads()
    one, other = FrameParser(LIMITS, known), FrameParser(LIMITS, known)
    found = []
    for parser, body in ((one, b"12"), (other, b"34"), (one, b"56")):
        parser.feed(b"SEND\na:\\c\ncontent-length:2\n\n" + body + b"\0")
        found.append(parser.next_frame())
    frames = [frame for frame in found if frame is not None]
    assert [frame.body for frame in frames] == [b"12", b"34", b"56"]
    assert all(frame.headers == {"a": ":", "content-length": "2"} for frame in frames)
    assert len({id(frame.head) for frame in frames}) == 1


def test_a_known_head_is_still_held_to_the_limits() -> None:
    known = KnownHeads()
    parser = FrameParser(LIMITS, known)
    parser.feed(b"SEND\ncontent-length:2\n\n12\0SEND\ncontent-length:2\n\n123\0")
    assert parser.next_frame() is not None
    with pytest.raises(FrameError, match="content-length"):
        parser.next_frame()
    small = FrameParser(LIMITS, known)
    small.body_bytes = 1
    small.feed(b"SEND\ncontent-length:2\n\n12\0")
    with pytest.raises(FrameError, match="1 bytes"):
        small.next_frame()


def test_known_heads_are_bounded_and_hold_no_secret() -> None:
    known = KnownHeads()
    parser = FrameParser(LIMITS, known)
    parser.feed(b"CONNECT\npasscode:secret\n\n\0SEND\nlong:" + b"x" * 2000 + b"\n\n\0")
    assert parser.next_frame() is not None
    assert parser.next_frame() is not None
    assert not known.heads
    for number in range(5_000):
        parser.feed(b"SEND\nnumber:%d\n\n\0" % number)
        assert parser.next_frame() is not None
    assert 0 < len(known.heads) <= 1_000


@pytest.mark.parametrize("name", [b"1-2", b"a", b"ID\\c7", b"x:y", b"", b"\xc3\xa4", b"1-2\nreceipt:3", b"1\r"])
def test_acknowledgements_are_read_alike_whatever_they_name(name: bytes) -> None:
    data = b"ACK\nid:" + name + b"\n\n\0"
    [short] = parse(data)
    [long] = parse(b"NACK" + data[3:])
    assert (short.command, long.command) == ("ACK", "NACK")
    assert short.headers == long.headers
    assert short.body == long.body == b""


@given(st.lists(st.binary(max_size=9_000), min_size=1, max_size=6), st.booleans())
def test_a_body_left_in_pieces_is_the_same_body(pieces: list[bytes], length: bool) -> None:
    body = b"".join(pieces) if length else b"".join(pieces).replace(b"\0", b"")
    head = b"SEND\ncontent-length:%d\n\n" % len(body) if length else b"SEND\n\n"
    parser = FrameParser(LIMITS, in_pieces=True)
    found = []
    data = head + body + b"\0" + head + body + b"\0"
    edges = [0, *itertools.accumulate(len(piece) + 1 for piece in pieces), len(data)]
    for start, stop in itertools.pairwise(edges):
        parser.feed(data[start:stop])
        while (frame := parser.next_frame()) is not None:
            found.append(frame)
    assert [b"".join(frame.pieces) if frame.pieces else frame.body for frame in found] == [body, body]
    assert [frame.length for frame in found] == [len(body), len(body)]
