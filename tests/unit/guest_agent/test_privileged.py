"""What the child of root does with settings that come, change or are of no use; and what the agent does of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.broker_address import BrokerAddress, Credentials
from common.config import GuestConfig
from common.files import keeper_socket
from guest_agent import privileged
from guest_agent.privileged import Watcher

ROOT = Path(__file__).resolve().parents[3]
OWNER = (os.getuid(), os.getgid())
OLD, NEW = b'{"guest": "old"}', b'{"guest": "new"}'


class Guest:
    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config = place / "config.json"
        self.found: tuple[str, bytes] | None = None
        monkeypatch.setattr(privileged, "CONFIG", str(self.config))
        monkeypatch.setattr(privileged, "discover", lambda gateway: self.found)
        self.agent, theirs = socket.socketpair()
        self.agent.setblocking(False)
        self.theirs = theirs

    def watcher(self, source: str) -> Watcher:
        return Watcher(self.theirs, source, OWNER)

    def heard(self) -> list[dict[str, object]]:
        try:
            return [json.loads(line) for line in self.agent.recv(65536).splitlines()]
        except BlockingIOError:
            return []


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guest]:
    made = Guest(tmp_path, monkeypatch)
    yield made
    made.agent.close()
    made.theirs.close()


def test_settings_that_come_late(guest: Guest) -> None:
    watcher = guest.watcher("")
    watcher.look(gateway=True)
    assert guest.heard() == [] and not guest.config.exists()
    guest.found = ("config drive", OLD + bytes(10))
    watcher.look(gateway=True)
    assert guest.config.read_bytes() == OLD
    assert guest.config.stat().st_mode & 0o777 == 0o400
    assert guest.heard() == [{"restored": False, "changed": False, "config": True}]


def test_settings_of_a_machine_that_was_restored_elsewhere(guest: Guest) -> None:
    guest.config.write_bytes(OLD)
    watcher = guest.watcher("config drive")
    guest.found = ("config drive", OLD)
    watcher.look(gateway=True)
    assert guest.heard() == []
    guest.found = ("config drive", NEW)
    watcher.look(gateway=True)
    assert guest.config.read_bytes() == NEW
    assert guest.heard() == [{"restored": True, "changed": True, "config": True}]


def test_settings_that_have_gone_stay_in_use(guest: Guest) -> None:
    guest.config.write_bytes(OLD)
    guest.watcher("fw_cfg").look(gateway=True)
    assert guest.config.read_bytes() == OLD and guest.heard() == []


def test_a_line_of_no_use_changes_nothing(guest: Guest, capsys: pytest.CaptureFixture[str]) -> None:
    watcher = guest.watcher("")
    for line in (b"", b"[]", b"{}", b'{"seed": "x"}', b"\xff"):
        watcher.told(line)
    assert guest.heard() == [] and not guest.config.exists()
    assert "was of no use" in capsys.readouterr().err


def test_who_is_asked_how_often(guest: Guest) -> None:
    assert guest.watcher("").patience(True) is None  # the line tells
    assert guest.watcher("").patience(False) == privileged.LOOK_AGAIN * 1000
    assert guest.watcher("line").patience(True) is None
    assert guest.watcher("config drive").patience(False) == privileged.WATCH * 1000


def test_an_agent_with_new_settings_ends_and_leaves_its_keeper(tmp_path: Path) -> None:
    """As `privileged.py` tells it; whatever supervises it starts the next one, which finds the commands."""
    config = GuestConfig(
        "g", "h", "n", (BrokerAddress("127.0.0.1", 9),), Credentials("g", "p"), "http://127.0.0.1:9", "s"
    )
    (tmp_path / "config.json").write_bytes(config.to_json())
    ours, theirs = socket.socketpair()
    argv = [sys.executable, "-m", "guest_agent", "--config", f"{tmp_path}/config.json", "--home", str(tmp_path)]
    with ours, subprocess.Popen([*argv, "--host-line"], stdin=theirs.fileno(), cwd=ROOT) as agent:
        theirs.close()
        ours.sendall(b'{"config": true, "restored": true, "changed": true}\n')
        assert agent.wait(60) == 0
    until = time.monotonic() + 30
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as keeper:
        while keeper.connect_ex(str(keeper_socket(tmp_path))):
            assert time.monotonic() < until, "the keeper ended with its agent"
            time.sleep(0.05)
        keeper.sendall(b"\0\0\0\x0d" + b'{"op":"quit"}')
        while keeper.recv(65536):
            pass
