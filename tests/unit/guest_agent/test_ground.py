"""What is made before the settings come works when they are there."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.task import Clock

from common.broker_address import BrokerAddress, Credentials
from common.config import GuestConfig
from guest_agent import ground, keeper
from guest_agent.agent import build_guest_agent
from guest_agent.ground import Ground, connect_keeper, rehearse
from guest_agent.keeper_socket import KeeperSocket


class Reactor(Clock):
    """Reads when it is told to."""

    def addReader(self, reader: Any) -> None:
        self.reader = reader


def test_first_words_can_be_rehearsed() -> None:
    rehearse()


def test_a_keeper_that_is_slow_to_listen_is_awaited(tmp_path: Path) -> None:
    path = tmp_path / "keeper"
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def listen() -> None:
        time.sleep(0.1)  # the keeper's start
        listening.bind(str(path))
        listening.listen()

    late = threading.Thread(target=listen)
    late.start()
    found = connect_keeper(path)
    late.join()
    assert found is not None
    found.close()
    listening.close()


def test_a_keeper_that_does_not_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ground, "PAUSE", 0.0)
    assert connect_keeper(tmp_path / "keeper") is None


@pytest.mark.parametrize("boots_again", [True, False])
def test_the_settings_say_what_a_journal_has_to_survive(tmp_path: Path, boots_again: bool) -> None:
    ours, its = socket.socketpair()
    ours_ground = Ground.of(_home(tmp_path), ours)
    config = GuestConfig(
        "g", "h", "box", (BrokerAddress("127.0.0.1", 1),), Credentials("l", "p"), "", "s", boots_again=boots_again
    )
    build_guest_agent(Reactor(), config, tmp_path, ours_ground)
    assert ours_ground.journal.lasting is boots_again
    ours_ground.journal.close()
    for each in (ours, its):
        each.close()


def test_what_a_keeper_said_before_anybody_read_is_heard(tmp_path: Path) -> None:
    ours, its = socket.socketpair()
    ours_ground = Ground.of(_home(tmp_path), ours)
    its.sendall(keeper.pack({"op": "state", "keeper": "k", "commands": []}))
    heard: list[dict[str, Any]] = []
    reactor = Reactor()
    made = KeeperSocket(reactor, tmp_path, lambda head, _: heard.append(head), lambda: None, ours_ground.keeper)
    made.connect()
    reactor.reader.doRead()
    assert heard == [{"op": "state", "keeper": "k", "commands": []}]
    made.tell({"op": "quit"})
    assert its.recv(1000) == keeper.pack({"op": "quit"})
    ours_ground.journal.close()
    its.close()
    ours.close()


def _home(path: Path) -> Path:
    from common.files import GUEST_STATE

    (path / GUEST_STATE).mkdir(parents=True)
    return path
