"""The logins of an external broker, and what guests are told of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from common.broker_address import BrokerAddress, Credentials, Dialect, Tls
from common.config import GuestConfig
from common.errors import ConfigError
from host_agent.broker.external import DRAIN_AGAIN, DRAINS_AT_ONCE, LOGIN_SECONDS, ExternalBroker
from host_agent.broker.settings import BrokerSettings


class FakeLink:
    """A link whose drains the test ends."""

    address = BrokerAddress("127.0.0.1", 1)
    connected = True

    def __init__(self) -> None:
        self.drains: dict[str, Deferred[bool]] = {}

    def drain(self, destination: str) -> Deferred[bool]:
        done: Deferred[bool] = Deferred()
        self.drains[destination] = done
        return done

    def drained(self, login: str, empty: bool = True) -> None:
        self.drains.pop(f"/queue/vmwrapper.guest.{login}").callback(empty)


def settings(folder: Path, *brokers: BrokerAddress) -> BrokerSettings:
    file = folder / "anna.toml"
    file.touch(mode=0o600)
    guests = {"anna-g1": "one", "anna-g2": "two"}
    return BrokerSettings(file, "rabbitmq", brokers, Credentials("anna", "p"), guests)


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Nobody:
    def broker_connected(self) -> None: ...

    def broker_disconnected(self, reason: str) -> None: ...

    def broker_message(self, destination: str, body: bytes) -> None: ...


NOBODY = Nobody()


@pytest.fixture
def broker(tmp_path: Path, clock: Clock) -> Iterator[ExternalBroker]:
    made = ExternalBroker(clock, settings(tmp_path, FakeLink.address))
    made.link([], NOBODY)
    yield made
    made.close()


def outcome(deferred: Deferred[Credentials]) -> list[Any]:
    """The result or the error, once it is there."""
    found: list[Any] = []
    deferred.addCallbacks(found.append, lambda failure: found.append(failure.value))
    return found


def test_a_login_is_given_when_its_queue_is_empty_and_to_one_guest(broker: ExternalBroker) -> None:
    waiting = outcome(broker.take_login())
    assert not waiting  # an agent that was killed may have left messages there
    link: Any = FakeLink()
    broker.use(link)
    broker.connected()
    link.drained("anna-g2")
    assert waiting == [Credentials("anna-g2", "two")]
    link.drained("anna-g1")
    assert outcome(broker.take_login()) == [Credentials("anna-g1", "one")]
    [error] = outcome(broker.take_login())
    assert isinstance(error, ConfigError) and "all 2 guest logins" in str(error)
    broker.return_login("anna-g1")
    waiting = outcome(broker.take_login())
    assert not waiting
    link.drained("anna-g1")
    assert waiting == [Credentials("anna-g1", "one")]


def test_what_could_not_be_drained_is_drained_on_the_next_connection(broker: ExternalBroker) -> None:
    link: Any = FakeLink()
    broker.use(link)
    broker.connected()
    for login in ("anna-g1", "anna-g2"):
        link.drained(login, empty=False)
    waiting = outcome(broker.take_login())
    broker.use(link)
    broker.connected()
    link.drained("anna-g1")
    assert waiting == [Credentials("anna-g1", "one")]


def test_what_could_not_be_drained_is_tried_again_while_the_connection_lasts(
    broker: ExternalBroker, clock: Clock
) -> None:
    link: Any = FakeLink()
    broker.use(link)
    broker.connected()
    waiting = outcome(broker.take_login())
    for login in ("anna-g1", "anna-g2"):
        link.drained(login, empty=False)
    assert not link.drains
    clock.advance(DRAIN_AGAIN)
    link.drained("anna-g2")
    assert waiting == [Credentials("anna-g2", "two")]
    link.drained("anna-g1", empty=False)
    link.connected = False  # then it waits for the next connection
    clock.advance(DRAIN_AGAIN)
    assert not link.drains


def test_a_thousand_queues_are_not_drained_at_once(tmp_path: Path, clock: Clock) -> None:
    guests = {f"anna-g{number}": "p" for number in range(1000)}
    broker = ExternalBroker(clock, attrs.evolve(settings(tmp_path, FakeLink.address), guests=guests))
    link: Any = FakeLink()
    broker.use(link)
    broker.connected()
    free = 0
    while link.drains:
        assert len(link.drains) <= DRAINS_AT_ONCE
        link.drains.pop(next(iter(link.drains))).callback(True)
        free += 1
    assert free == 1000


def test_the_login_of_a_guest_that_is_found_again_is_not_given_to_another(broker: ExternalBroker) -> None:
    broker.keep_login(Credentials("anna-g1", "one"))
    broker.keep_login(Credentials("gone-from-the-file", "x"))
    link: Any = FakeLink()
    broker.use(link)
    broker.connected()
    assert list(link.drains) == ["/queue/vmwrapper.guest.anna-g2"]  # what the other has coming is its own
    link.drained("anna-g2")
    assert outcome(broker.take_login()) == [Credentials("anna-g2", "two")]


def test_a_wait_for_a_login_has_an_end(broker: ExternalBroker, clock: Clock) -> None:
    waiting = outcome(broker.take_login())
    clock.advance(LOGIN_SECONDS)
    assert "the broker is not connected" in str(waiting[0])


def test_one_agent_at_a_time(broker: ExternalBroker, tmp_path: Path, clock: Clock) -> None:
    second = ExternalBroker(clock, settings(tmp_path, FakeLink.address))
    with pytest.raises(ConfigError, match="another host agent uses"):
        second.link([], NOBODY)
    broker.close()
    second.link([], NOBODY)
    second.close()


def test_guests_know_every_name_that_a_broker_may_show(tmp_path: Path, clock: Clock) -> None:
    tls = Tls("PEM")
    brokers = [BrokerAddress(name, 1, tls) for name in ("one.example", "two.example", "one.example")]
    found = ExternalBroker(clock, settings(tmp_path, *brokers)).guest_brokers("10.0.2.100", 61613)
    assert [(each.host, each.port) for each in found] == [("10.0.2.100", 61613)] * 2
    assert [each.tls.server_name for each in found if each.tls] == ["one.example", "two.example"]


@pytest.mark.parametrize("tls", [None, Tls("-----BEGIN CERTIFICATE-----\n…", "broker.example")])
def test_a_guests_settings_survive_the_way_to_it(tmp_path: Path, tls: Tls | None) -> None:
    config = GuestConfig(
        guest="g-1",
        host="anna",
        name="box",
        brokers=(BrokerAddress("10.0.2.100", 61613, tls),),
        credentials=Credentials("anna-g1", "passcode"),
        files="http://10.0.2.100:61614",
        secret="secret",
        dialect=Dialect.RABBITMQ,
        boots_again=False,
    )
    file = tmp_path / "config.json"
    file.write_bytes(config.to_json())
    assert GuestConfig.load(file) == config
    assert "passcode'" not in repr(config) and "'secret'" not in repr(config)
    file.write_bytes(attrs.evolve(config, name="x").to_json().replace(b'"rabbitmq"', b'"klingon"'))
    with pytest.raises(ConfigError, match="not a guest agent's settings"):
        GuestConfig.load(file)
