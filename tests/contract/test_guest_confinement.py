"""A guest with a valid login of its own, and bad intentions, on the real brokers: it reads its own queue, writes to its
host's and to the presence topic, and nothing else, whatever it calls the destination."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Iterator

import attrs
import pytest

from common import messages
from common.broker_address import BrokerAddress, Credentials, Dialect, Tls
from host_agent.broker.access import OwnBroker
from host_agent.broker.check import Client, check_broker
from host_agent.broker.setup.plan import Login
from host_agent.broker.watch import WatchSettings
from host_agent.monitor.listener import Listener
from tests.brokers import RunningBroker
from tests.contract.raw_stomp import RawStomp

SECONDS = 60.0
SILENCE = 0.5
BATCH = 8  # intruders at once


@attrs.frozen
class Site:
    """A broker with two hosts of two guests each."""

    broker: RunningBroker

    @property
    def dialect(self) -> Dialect:
        return self.broker.settings.dialect

    @property
    def address(self) -> BrokerAddress:
        plan = self.broker.plan
        return BrokerAddress(plan.names[0], plan.port, Tls(plan.ca.read_text()) if plan.tls else None)

    def client(self, login: Login) -> Client:
        client = Client(self.address, Credentials(login.name, login.passcode), self.dialect)
        assert client.open() == ""
        return client

    def raw(self, login: Login) -> RawStomp:
        plan = self.broker.plan
        client = RawStomp(plan.names[0], plan.port, seconds=SECONDS, ca=plan.ca.read_text() if plan.tls else "")
        assert client.login(login.name, login.passcode).command == "CONNECTED"
        return client


@pytest.fixture(params=["activemq", "rabbitmq"])
def site(request: pytest.FixtureRequest) -> Site:
    return Site(request.getfixturevalue(request.param))


@pytest.fixture
def closing() -> Iterator[Callable[[Client], Client]]:
    with contextlib.ExitStack() as stack:

        def keep(client: Client) -> Client:
            stack.callback(client.close)
            return client

        yield keep


def names_of(queue: str) -> list[str]:
    """Every way to call a queue that one of the brokers may understand."""
    return [
        f"/queue/{queue}",
        f"/amq/queue/{queue}",
        f"/exchange/{queue}",
        f"/exchange/{queue}/{queue}",
        f"/exchange//{queue}",
        f"/exchange/amq.default/{queue}",
        f"/exchange/amq.fanout/{queue}",
        f"/exchange/amq.topic/{queue}",
        f"/topic/{queue}",
        f"/dsub/{queue}",
        f"/temp-queue/{queue}",
        f"/reply-queue/{queue}",
        f"/remote-temp-queue/{queue}",
        queue,
    ]


def wildcards(queue: str, own: str) -> list[str]:
    return [
        "/queue/>",
        "/queue/vmwrapper.>",
        "/queue/vmwrapper.guest.>",
        "/queue/vmwrapper.guest.*",
        "/queue/vmwrapper.*.*",
        "/topic/>",
        "/topic/#",
        "/exchange/amq.topic/#",
        "/exchange/vmwrapper.presence",
        f"/queue/{own},{queue}",
        f"/queue/{queue},{own}",
        f"/queue/{own},queue://{queue}",
        f"/queue/{own}?consumer.exclusive=true,{queue}",
        f"/queue/Consumer.a.{queue}",
        "/queue/ActiveMQ.DLQ",
    ]


@pytest.mark.parametrize("target", ["guest of the same host", "guest of another host", "its own host"])
def test_a_guest_cannot_read_another_queue(site: Site, closing: Callable[[Client], Client], target: str) -> None:
    one, two = site.broker.plan.hosts
    guest = one.guests[0]
    sender, queue = {
        "guest of the same host": (one.host, f"vmwrapper.guest.{one.guests[1].name}"),
        "guest of another host": (two.host, f"vmwrapper.guest.{two.guests[0].name}"),
        "its own host": (one.guests[1], f"vmwrapper.host.{one.host.name}"),
    }[target]
    own = f"vmwrapper.guest.{guest.name}"
    allowed = closing(site.client(sender))
    options: list[dict[str, str]] = [{}]
    if site.broker.plan.kind == "activemq":
        options += [{"browser": "true"}, {"activemq.exclusive": "true", "activemq.priority": "127"}]
    attempts = [(name, extra) for name in [*names_of(queue), *wildcards(queue, own)] for extra in options]
    for start in range(0, len(attempts), BATCH):
        marks = [uuid.uuid4().hex.encode() for _ in range(2 * BATCH)]
        # Before and after: a browser sees only what is there already, a consumer has to share with the others.
        for mark in marks[:BATCH]:
            allowed.send(f"/queue/{queue}", mark)
        with contextlib.ExitStack() as stack:
            intruders = [(name, stack.enter_context(site.raw(guest))) for name, _ in attempts[start : start + BATCH]]
            heard: list[bytes] = []
            for (name, intruder), (_, extra) in zip(intruders, attempts[start:], strict=False):
                intruder.send("SUBSCRIBE", {"id": "1", "destination": name, "ack": "auto", "receipt": "1", **extra})
                heard += bodies(intruder, 0.2)
            for mark in marks[BATCH:]:
                allowed.send(f"/queue/{queue}", mark)
            for name, intruder in intruders:
                heard += bodies(intruder, SILENCE / BATCH)
                assert not set(heard) & set(marks), name
        assert allowed.reason == ""


def bodies(client: RawStomp, seconds: float) -> list[bytes]:
    """What arrives until nothing more does; whatever the broker says about it, or does to the connection."""
    found = []
    with contextlib.suppress(OSError):
        while True:
            frame = client.receive(seconds)
            if frame.command == "MESSAGE":
                found.append(frame.body)
            elif frame.command == "ERROR":
                break
    return found


@pytest.mark.parametrize("target", ["guest of the same host", "guest of another host", "another host"])
def test_a_guest_cannot_write_to_another_queue(site: Site, closing: Callable[[Client], Client], target: str) -> None:
    one, two = site.broker.plan.hosts
    guest = one.guests[0]
    victim, queue = {
        "guest of the same host": (one.guests[1], f"vmwrapper.guest.{one.guests[1].name}"),
        "guest of another host": (two.guests[0], f"vmwrapper.guest.{two.guests[0].name}"),
        "another host": (two.host, f"vmwrapper.host.{two.host.name}"),
    }[target]
    reader = closing(site.client(victim))
    reader.subscribe(f"/queue/{queue}")
    host_queue = f"vmwrapper.host.{one.host.name}"
    composites = [
        f"/queue/{host_queue},{queue}",
        f"/queue/{queue},{host_queue}",
        f"/queue/{host_queue},queue://{queue}",
        "/queue/vmwrapper.guest.>",
        "/queue/vmwrapper.>",
        f"/queue/VirtualTopic.{queue}",
    ]
    mark = uuid.uuid4().hex.encode()
    for destination in [*names_of(queue), *composites]:
        # The reply-to of a message is followed by some brokers, and so are transactions.
        for extra in ({}, {"reply-to": f"/queue/{queue}"}, {"transaction": "t"}):
            with contextlib.suppress(OSError), site.raw(guest) as intruder:
                if "transaction" in extra:
                    intruder.send("BEGIN", {"transaction": "t"})
                intruder.send("SEND", {"destination": destination, "receipt": "1", **extra}, mark)
                if "transaction" in extra:
                    intruder.send("COMMIT", {"transaction": "t", "receipt": "2"})
                with contextlib.suppress(TimeoutError):
                    intruder.receive(0.2)
    assert not reader.hears(mark, SILENCE)
    assert reader.reason == ""


def test_a_guest_cannot_hear_other_guests_beacons(site: Site, closing: Callable[[Client], Client]) -> None:
    one = site.broker.plan.hosts[0]
    other = closing(site.client(one.guests[1]))
    for name in [*names_of("vmwrapper.presence"), *names_of(f"vmwrapper.presence.{one.host.name}"), "/topic/>"]:
        with site.raw(one.guests[0]) as spy:
            spy.send("SUBSCRIBE", {"id": "1", "destination": name, "ack": "auto", "receipt": "1"})
            heard = bodies(spy, 0.1)
            other.send(messages.PRESENCE, b"a beacon")
            assert b"a beacon" not in heard + bodies(spy, 0.1), name


def test_only_hosts_tell_the_status_and_only_monitors_hear_it(site: Site, closing: Callable[[Client], Client]) -> None:
    one = site.broker.plan.hosts[0]
    names = names_of("vmwrapper.status")
    settings = WatchSettings.load(site.broker.plan.monitor_settings)
    listener = Listener(settings)
    listener.start()
    heard: list[bytes] = []

    def hears(mark: bytes, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while mark not in heard and time.monotonic() < deadline:
            heard.extend(body for topic, body in listener.take().messages if topic == messages.STATUS)
            time.sleep(0.05)  # a listener is asked now and then
        return mark in heard

    try:
        host = closing(site.client(one.host))
        first = time.monotonic() + SECONDS
        while not hears(b"a status", SILENCE) and time.monotonic() < first:
            host.send(messages.STATUS, b"a status")
        assert b"a status" in heard and host.reason == ""
        spies = [(one.guests[0], name) for name in [*names, "/topic/>", "/topic/vmwrapper.>"]]
        advisories = ("/topic/ActiveMQ.Advisory.>", "/topic/ActiveMQ.Advisory.Connection")
        spies += [(one.guests[0], name) for name in advisories]
        spies += [(one.host, name) for name in (messages.STATUS, "/exchange/vmwrapper.status", "/topic/>")]
        for login, name in spies:
            with site.raw(login) as spy:
                spy.send("SUBSCRIBE", {"id": "1", "destination": name, "ack": "auto", "receipt": "1"})
                said = bodies(spy, 0.1)
                host.send(messages.STATUS, b"another status")
                said += bodies(spy, 0.1)
                assert b"another status" not in said, name
                assert said == [], name
        for name in names:
            with contextlib.suppress(OSError), site.raw(one.guests[0]) as liar:
                liar.send("SEND", {"destination": name, "receipt": "1"}, b"a lie")
                with contextlib.suppress(TimeoutError):
                    liar.receive(0.2)
        assert not hears(b"a lie", SILENCE)
        assert hears(b"another status", SECONDS)
    finally:
        listener.stop()
        listener.join()


def statistics(client: RawStomp, name: str) -> dict[str, object]:
    """What ActiveMQ tells of itself or of a destination."""
    client.send("SEND", {"destination": f"/queue/ActiveMQ.Statistics.{name}", "reply-to": "/temp-queue/s"})
    found: dict[str, object] = {}
    for entry in json.loads(client.receive().body)["map"]["entry"]:
        key, *value = [entry["string"]] if isinstance(entry["string"], str) else entry["string"]
        found[key] = value[0] if value else next(entry[kind] for kind in entry if kind != "string")
    return found


def test_only_the_monitor_reads_statistics(activemq: RunningBroker) -> None:
    site = Site(activemq)
    asks = {"id": "1", "destination": "/temp-queue/s", "ack": "auto", "receipt": "1", "transformation": "jms-map-json"}
    with site.raw(activemq.plan.hosts[0].guests[0]) as guest:
        guest.send("SUBSCRIBE", asks)
        assert guest.receive().command == "ERROR"
    with site.raw(activemq.plan.monitor) as monitor:
        monitor.send("SUBSCRIBE", asks)
        assert monitor.receive().command == "RECEIPT"
        assert "enqueueCount" in statistics(monitor, "Broker")


def test_refused_messages_go_to_the_dead_letters(activemq: RunningBroker) -> None:
    site, one = Site(activemq), activemq.plan.hosts[1]
    queue = messages.host_queue(one.host.name)
    with site.raw(one.host) as host, site.raw(one.guests[0]) as guest, site.raw(activemq.plan.monitor) as monitor:
        host.send("SUBSCRIBE", {"id": "1", "destination": queue, "ack": "client-individual", "receipt": "1"})
        assert host.receive().command == "RECEIPT"
        guest.send("SEND", {"destination": queue}, b"refused")
        host.send("NACK", {"id": host.receive().headers["ack"], "receipt": "2"})
        assert host.receive().command == "RECEIPT"
        asks = {"id": "1", "destination": "/temp-queue/s", "ack": "auto", "transformation": "jms-map-json"}
        monitor.send("SUBSCRIBE", asks)
        assert statistics(monitor, "Destination.ActiveMQ.DLQ")["size"] == 1


def test_a_host_cannot_touch_what_belongs_to_another_host(site: Site, closing: Callable[[Client], Client]) -> None:
    one, two = site.broker.plan.hosts
    victim = closing(site.client(two.guests[0]))
    victim.subscribe(messages.guest_queue(two.guests[0].name))
    mark = uuid.uuid4().hex.encode()
    for destination in names_of(f"vmwrapper.guest.{two.guests[0].name}"):
        with contextlib.suppress(OSError), site.raw(one.host) as intruder:
            intruder.send("SEND", {"destination": destination, "receipt": "1"}, mark)
            with contextlib.suppress(TimeoutError):
                intruder.receive(0.2)
    assert not victim.hears(mark, SILENCE)


def test_check_finds_nothing_wrong(external: RunningBroker) -> None:
    findings = list(check_broker(external.settings))
    assert all(finding.good for finding in findings), findings
    assert len(findings) >= 10


def test_the_embedded_broker_knows_the_same_rules() -> None:
    broker = OwnBroker(None, "h-1")
    results: list[Credentials] = []
    for _ in range(2):
        broker.take_login().addCallback(results.append)
    guest, other = results
    principal = broker.authenticate(guest.login, guest.passcode)
    assert principal is not None
    assert broker.authenticate(guest.login, other.passcode) is None
    queue, foreign = messages.guest_queue(guest.login), messages.guest_queue(other.login)
    assert principal.may_subscribe(queue) and not principal.may_send(queue)
    for name in [foreign, *names_of(foreign[7:]), *wildcards(foreign[7:], queue[7:]), messages.host_queue("h-2")]:
        assert not principal.may_subscribe(name) and not principal.may_send(name)
    assert principal.may_send(messages.host_queue("h-1")) and not principal.may_subscribe(messages.host_queue("h-1"))
    assert principal.may_send(messages.PRESENCE) and not principal.may_subscribe(messages.PRESENCE)
