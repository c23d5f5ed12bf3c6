"""What is written to a client, on real sockets: whole, in order, and no more than the client reads."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import pytest_twisted

from host_agent.broker.embedded import EmbeddedBroker
from host_agent.broker.limits import BrokerLimits
from tests.contract.raw_stomp import RawStomp
from tests.unit.broker.harness import any_login
from tests.unit.broker.test_embedded_sockets import Steps, client, in_thread, in_time, on_reactor, reactor

DESTINATION = {"destination": "/queue/out"}


@pytest.fixture
def broker() -> Iterator[EmbeddedBroker]:
    # A client that ends gets the time to read all that it has left unread.
    made = EmbeddedBroker(reactor, authenticate=any_login, limits=BrokerLimits(closing_seconds=20))
    yield made
    pytest_twisted.blockon(in_time(made.stop()))


def bodies(count: int) -> list[bytes]:
    """Small and large ones by turns, each another."""
    dice = random.Random(1)
    return [dice.randbytes(dice.choice((0, 1, 200, 5_000, 70_000, 1_000_000))) for _ in range(count)]


def subscribed(port: int) -> RawStomp:
    """A client that reads nothing until it is asked to."""
    made = client(port)
    made.send("SUBSCRIBE", {"id": "1", "receipt": "s", **DESTINATION})
    assert made.receive().command == "RECEIPT"
    return made


def publish(sender: RawStomp, sent: list[bytes]) -> None:
    """Return when the broker has all of them."""
    for body in sent:
        sender.send("SEND", DESTINATION, body)
    sender.send("SEND", {"destination": "/topic/nobody", "receipt": "done"})
    assert sender.receive().command == "RECEIPT"


@on_reactor
def test_bodies_of_all_sizes_arrive_whole_and_in_order(broker: EmbeddedBroker) -> Steps:
    listening = yield in_time(broker.listen("127.0.0.1", 0))
    sent = bodies(60)

    def exchange(port: int) -> None:
        with client(port) as sender, subscribed(port) as reader:
            publish(sender, sent)
            assert [reader.receive().body for _ in sent] == sent

    yield in_thread(exchange, listening.getHost().port)
    assert broker.statistics().messages == 0
    assert broker.statistics().bytes_sent > sum(map(len, sent))


@on_reactor
def test_an_answer_keeps_its_place_behind_what_was_not_read(broker: EmbeddedBroker) -> Steps:
    listening = yield in_time(broker.listen("127.0.0.1", 0))
    sent = [b"x" * 500_000] * 40

    def exchange(port: int) -> None:
        with client(port) as sender, subscribed(port) as reader:
            publish(sender, sent)
            reader.send("SEND", {"destination": "/topic/nobody", "receipt": "mine"})
            seen = [reader.receive() for _ in range(len(sent) + 1)]
            assert sorted(frame.command for frame in seen) == ["MESSAGE"] * len(sent) + ["RECEIPT"]
            assert [frame.body for frame in seen if frame.command == "MESSAGE"] == sent

    yield in_thread(exchange, listening.getHost().port)


@on_reactor
def test_the_goodbye_comes_after_what_was_not_read(broker: EmbeddedBroker) -> Steps:
    listening = yield in_time(broker.listen("127.0.0.1", 0))
    body = b"y" * 4_000_000

    def leave_unread(port: int) -> RawStomp:
        with client(port) as sender:
            reader = subscribed(port)
            for _ in range(4):
                sender.send("SEND", DESTINATION, body)
            sender.send("SEND", {"destination": "/topic/nobody", "receipt": "done"})
            assert sender.receive().command == "RECEIPT"
        return reader

    reader = yield in_thread(leave_unread, listening.getHost().port)
    stopped = broker.stop()

    def read_all(_: int) -> list[str]:
        commands: list[str] = []
        while not commands or commands[-1] != "ERROR":
            frame = reader.receive()
            assert frame.command == "ERROR" or frame.body == body
            commands.append(frame.command)
        reader.close()
        return commands

    commands = yield in_thread(read_all, 0)
    yield in_time(stopped)
    assert commands[:-1] == ["MESSAGE"] * (len(commands) - 1)
    assert commands[0] == "MESSAGE"
