"""A guest that is gone, or reads no more, holds up nobody, and what was meant for it does not stay for ever."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from common import messages
from common.broker_address import BrokerAddress, Credentials
from host_agent.broker.check import Client
from host_agent.broker.setup.plan import MIB, Limits, Login
from tests.brokers import RunningBroker

SECONDS = 60.0
MESSAGE_SECONDS = 3


@pytest.fixture(scope="module", params=["activemq", "rabbitmq"])
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    limits = Limits(message_seconds=MESSAGE_SECONDS, queue_bytes=8 * MIB)
    with RunningBroker.make(request.param, tmp_path_factory.mktemp("dead"), guests=3, limits=limits) as running:
        yield running


def client(broker: RunningBroker, login: Login) -> Client:
    made = Client(
        BrokerAddress("localhost", broker.port), Credentials(login.name, login.passcode), broker.settings.dialect
    )
    assert made.open() == ""
    return made


def test_the_host_goes_on_when_a_guests_queue_is_over_its_limit(broker: RunningBroker) -> None:
    one = broker.plan.hosts[0]
    host, alive = client(broker, one.host), client(broker, one.guests[0])
    alive.subscribe(messages.guest_queue(one.guests[0].name))
    body = b"x" * 65536
    for number in range(4):
        for _ in range(128):  # 8 MiB each time
            host.send(messages.guest_queue(one.guests[1].name), body)
        mark, deadline = b"mark %d" % number, time.monotonic() + SECONDS
        while True:  # as our agents do: on a loaded machine it may expire before it is delivered
            host.send(messages.guest_queue(one.guests[0].name), mark)
            if alive.hears(mark, MESSAGE_SECONDS):
                break
            assert time.monotonic() < deadline, host.reason or alive.reason
    assert host.reason == ""
    for each in (host, alive):
        each.close()


def test_what_nobody_reads_expires(broker: RunningBroker) -> None:
    one = broker.plan.hosts[0]
    host = client(broker, one.host)
    queue = messages.guest_queue(one.guests[2].name)
    sent = time.monotonic()
    for number in range(10):
        host.send(queue, b"old %d" % number)
    while time.monotonic() < sent + MESSAGE_SECONDS + 0.5:  # time is what this is about
        time.sleep(0.1)
    guest = client(broker, one.guests[2])
    guest.subscribe(queue)
    for _ in range(10):
        host.send(queue, b"new")
        if guest.hears(b"new", MESSAGE_SECONDS):
            break
    assert set(guest.heard) == {b"new"}
    for each in (host, guest):
        each.close()
