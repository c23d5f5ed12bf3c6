"""What the guest agent does when its host says something beside the network."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from twisted.internet.task import Clock

from guest_agent import host_line
from guest_agent.host_line import HostLine


@pytest.fixture
def write_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    read_end, write_end = os.pipe()
    monkeypatch.setattr(host_line, "STDIN", read_end)
    yield write_end
    os.close(read_end)
    os.close(write_end)


@pytest.mark.parametrize(
    ("line", "done"),
    [
        (b'{"time": 1.0, "restored": false}', ["there"]),
        (b'{"time": 1.0, "restored": true}', ["restored"]),
        (b'{"config": true, "restored": true, "changed": true}', ["changed"]),
        (b'{"time": 1.0, "restored": false}\n{"time": 2.0, "restored": true}', ["there", "restored"]),
    ],
)
def test_what_a_line_does(write_end: int, line: bytes, done: list[str]) -> None:
    did: list[str] = []
    heard = HostLine(
        Clock(), lambda: did.append("restored"), lambda: did.append("changed"), lambda: did.append("there")
    )
    for part in (line[:9], line[9:], b"\n"):
        os.write(write_end, part)
        heard.doRead()
    assert did == done
