"""The control interface's own rules: hello first, one answer for each request, and bounds."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from twisted.internet.testing import StringTransport

from common.errors import ConfigError
from host_agent import control
from host_agent.control import ControlServer, _ControlFactory
from host_agent.operations import _number


class Calls:
    """Stands for the operations: `big` answers with a thousand bytes, `talk` tells something before it ends."""

    def handler(self, call: str) -> Any:
        calls: dict[str, Any] = {
            "big": lambda args, update: {"text": "x" * 1000},
            "talk": lambda args, update: update("word", {"bytes": b"x"}),
        }
        return calls.get(call)


@pytest.fixture
def client() -> tuple[Any, StringTransport]:
    operations: Any = Calls()
    connection: Any = _ControlFactory(ControlServer(None, "h-1", operations)).buildProtocol(None)
    transport = StringTransport()
    connection.makeConnection(transport)
    return connection, transport


def ask(connection: Any, number: int, call: str) -> None:
    connection.dataReceived(json.dumps({"id": number, "call": call, "args": {}}).encode() + b"\n")


def answers(transport: StringTransport) -> list[dict[str, Any]]:
    return [json.loads(line) for line in transport.value().splitlines()]


def test_hello_then_calls(client: tuple[Any, StringTransport]) -> None:
    connection, transport = client
    ask(connection, 1, "hello")
    ask(connection, 2, "big")
    ask(connection, 3, "nothing")
    first, second, third = answers(transport)
    assert (first["id"], first["done"]["agent"]) == (1, "h-1")
    assert len(second["done"]["text"]) == 1000
    assert third["error"]["code"] == "bad_request"


def test_a_quiet_request_gets_its_answer_and_no_updates(client: tuple[Any, StringTransport]) -> None:
    connection, transport = client
    ask(connection, 1, "hello")
    for number, more in ((2, {}), (3, {"quiet": False}), (4, {"quiet": True})):
        request = {"id": number, "call": "talk", "args": {}, **more}
        connection.dataReceived(json.dumps(request).encode() + b"\n")
    told = [(each["id"], each.get("update", "done")) for each in answers(transport)]
    assert told == [(1, "done"), (2, "word"), (2, "done"), (3, "word"), (3, "done"), (4, "done")]


@pytest.mark.parametrize("line", [b"{}", b"[" * 5000, b"x", b'{"id":1,"call":"big"}', b'{"id":"1","call":"hello"}'])
def test_what_is_no_request_ends_the_connection(client: tuple[Any, StringTransport], line: bytes) -> None:
    connection, transport = client
    connection.dataReceived(line + b"\n")
    assert transport.disconnected
    assert answers(transport) == []


def test_a_client_that_does_not_read_is_dropped(
    client: tuple[Any, StringTransport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "MAX_BACKLOG", 5000)
    connection, transport = client
    ask(connection, 1, "hello")
    for number in range(2, 20):
        ask(connection, number, "big")
    assert not transport.disconnected  # it reads
    connection.pauseProducing()
    for number in range(20, 40):
        ask(connection, number, "big")
    assert transport.disconnected


@pytest.mark.parametrize("deadline", [-1, math.nan, math.inf, True, "5", [5]])
def test_what_is_no_number_of_seconds(deadline: Any) -> None:
    with pytest.raises(ConfigError, match="deadline_s must be a number"):
        _number({"deadline_s": deadline}, "deadline_s")
    assert _number({"deadline_s": 5}, "deadline_s") == 5.0
