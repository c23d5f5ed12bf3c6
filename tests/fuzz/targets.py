"""What is fuzzed: each target takes bytes and returns, whatever they are; an exception is a finding.

Besides "it does not crash", a target holds what must be true of whatever was accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from common import messages
from common.errors import ProtocolError, TransferError
from common.transfer import Manifest
from host_agent.broker.frames import Frame, FrameError, FrameParser, encode
from host_agent.broker.limits import FrameLimits
from host_agent.wrapper.job import JobError
from host_agent.wrapper.job_parse import parse_job

CORPUS = Path(__file__).with_name("corpus")
LIMITS = FrameLimits(command_bytes=16, header_count=8, header_line_bytes=64, header_bytes=256, body_bytes=512)


def frames(data: bytes) -> None:
    """The broker's frame parser: how the bytes are cut into segments must not matter, and limits hold."""
    whole, end = _parse(data, len(data) or 1)
    for size in (1, 7):
        pieces, other = _parse(data, size)
        assert (pieces, other is None) == (whole, end is None), (whole, pieces, end, other)
    for frame in whole:
        assert len(frame.command) <= LIMITS.command_bytes
        assert len(frame.headers) <= LIMITS.header_count
        assert len(frame.body) <= LIMITS.body_bytes
        try:
            again, problem = _parse(encode(frame.command, {**frame.headers, "content-length": "0"}), 1 << 20)
        except FrameError:
            continue  # a header that STOMP cannot write, as of CONNECT
        assert problem is not None or len(again) == 1


def _parse(data: bytes, segment: int) -> tuple[list[Frame], FrameError | None]:
    parser = FrameParser(LIMITS)
    found: list[Frame] = []
    try:
        for start in range(0, len(data), segment):
            parser.feed(data[start : start + segment])
            while (frame := parser.next_frame()) is not None:
                found.append(Frame(*frame[:3]))  # what it says, not how it was read
    except FrameError as error:
        return found, error
    return found, None


def protocol_messages(data: bytes) -> None:
    """A message of the other agent: what is accepted can be sent on and is the same then."""
    try:
        envelope = messages.decode(data)
    except ProtocolError as error:
        assert len(str(error)) < 1000, "a sentence must not repeat what it was sent"
        return
    try:
        again = messages.encode(envelope)
    except ProtocolError:
        return  # longer than it came, because other characters are escaped
    assert messages.decode(again) == envelope


def manifest(data: bytes) -> None:
    """The list of files of a copy: nothing that is accepted leads out of the copy."""
    try:
        accepted = Manifest.from_json(data)
    except TransferError as error:
        assert len(str(error)) < 1000
        return
    assert Manifest.from_json(accepted.to_json()) == accepted
    for entry in accepted.entries:
        assert not entry.path.startswith("/") and ".." not in entry.path.split("/") and "\0" not in entry.path
    assert accepted.total >= 0


def job(data: bytes) -> None:
    """A project's job.xml."""
    for strict in (False, True):
        try:
            parse_job(data, Path("job.xml"), strict)
        except JobError as error:
            assert "\n" not in str(error)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "frames": frames,
    "messages": protocol_messages,
    "manifest": manifest,
    "job": job,
}
