"""Host agents elsewhere: all that is known of them came through a broker. Real brokers, real agents, a real browser."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import attrs
import pytest
from playwright.sync_api import Browser

from common import messages
from common.broker_address import BrokerAddress, Credentials, Dialect
from common.messages import Beacon, Envelope, Message, Status
from host_agent.broker.check import Client
from host_agent.broker.watch import WatchSettings
from host_agent.monitor.gather import Gatherer
from host_agent.monitor.model import Model
from tests.brokers import RunningBroker
from tests.contract.broker_process import running_broker
from tests.system.agent_process import AgentProcess, agent_process

from .conftest import DEADLINE, looking, monitor_process

HTML = "<img src=x onerror=\"document.title='taken over'\">"


@attrs.define
class Watching:
    """The terminal's way to a model, without a host agent on this machine."""

    model: Model
    gatherer: Gatherer

    def until(self, seen: Callable[[Model], object], seconds: float = DEADLINE) -> None:
        deadline = time.monotonic() + seconds
        while True:
            self.gatherer.look()
            if seen(self.model):
                return
            tables = {name: dict(table.rows) for name, table in self.model.tables.items()}
            assert time.monotonic() < deadline, (tables, list(self.model.events)[-5:])
            time.sleep(0.1)  # it looks now and then, as the terminal does


@pytest.fixture
def watching() -> Iterator[Callable[..., Watching]]:
    made: list[Gatherer] = []

    def watch(*settings: WatchSettings) -> Watching:
        model = Model()
        gatherer = Gatherer(model, list, settings)
        made.append(gatherer)
        return Watching(model, gatherer)

    yield watch
    for gatherer in made:
        gatherer.close()


def agent_of(broker: RunningBroker, folder: Path) -> AbstractContextManager[AgentProcess]:
    folder.mkdir(exist_ok=True)
    return agent_process(folder, "--broker", str(broker.settings_file))


def test_a_host_elsewhere_is_seen_through_rabbitmq(
    rabbitmq: RunningBroker, tmp_path: Path, watching: Callable[..., Watching]
) -> None:
    settings = WatchSettings.load(rabbitmq.plan.monitor_settings)
    one, two = watching(settings), watching(settings)  # RabbitMQ would let two readers of one queue take turns
    with agent_of(rabbitmq, tmp_path) as agent:
        agent.start_vm("box")
        agent.begin("box", "c-long", "sleep 300")
        for each in (one, two):
            each.until(lambda model: any(row["command"] == "c-long" for _, row in model.commands))
            each.until(lambda model: any(row["vm"] == "box" and row["agent_version"] for _, row in model.guests))
            (guest,) = (row for _, row in each.model.guests)
            assert (guest["host"], guest["state"], guest["agent"]) == ("host-a", "running", "present")
            (host,) = (row for _, row in each.model.hosts)
            assert host["host"] == "host-a" and host["via"] == str(settings.broker) and host["pid"]
        # A beacon says when it was last heard, and how it does.
        one.until(lambda model: any(row["load"] is not None for _, row in model.guests))
        agent.call("signal", command="c-long", signal="KILL")
        one.until(lambda model: "was ended by signal KILL" in str(model.troubles()))
        assert "on host-a: vmctl trace c-long" in str(one.model.troubles())
    one.until(lambda model: len(model.hosts) == 0 and len(model.guests) == 0)  # it has said goodbye


def test_a_host_agent_elsewhere_that_hangs_turns_red_with_the_next_step(
    browser: Browser, activemq: RunningBroker, tmp_path: Path
) -> None:
    with (
        agent_of(activemq, tmp_path / "far") as agent,
        monitor_process(tmp_path, "--control", "--broker", str(activemq.plan.monitor_settings)) as monitor,
        looking(browser, monitor.url) as looked,
    ):
        page = looked.page
        agent.start_vm("far-box")
        second = agent.start_vm("second")
        agent.begin("far-box", "c-far", "sleep 300")
        looked.see("host-a", "#hosts tbody")
        looked.see("far-box", "#guests tbody")
        looked.see("sleep 300", "#commands tbody")
        looked.see("command_started", "#events tbody")
        row = page.locator("#guests tbody tr", has_text="far-box")
        row.get_by_text("running, agent present").wait_for()
        row.click()
        looked.see("heard through the broker", "#detail-control")
        assert page.locator("#detail-control button").count() == 0
        page.keyboard.press("Escape")
        # A guest's end is told by its host agent at once.
        for victim in [p for p in agent.left_over() if str(second) in " ".join(p.cmdline())]:
            try:
                os.kill(victim.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # its process 1 took it along
        looked.see("on host-a: vmctl stop second", "#troubles")
        assert agent.process is not None
        os.kill(agent.process.pid, signal.SIGSTOP)  # it hangs, and with it its guests' way to the broker
        try:
            looked.see("host-a: silent for", "#troubles")
            looked.see("start it again with its --state", "#troubles")
            looked.see("far-box is not heard, as its host agent host-a is silent", "#guests")
            looked.keep("silent-host")
            assert 'vmwrapper_host_agent_up{host="host-a"} 0.0' in monitor.metrics()
        finally:
            os.kill(agent.process.pid, signal.SIGCONT)
        looked.count("#hosts tr.red", 0)


@attrs.define
class Site:
    """The embedded broker by itself, and words of hosts and guests that are made up."""

    client: Client
    settings: WatchSettings

    def say(self, topic: str, message: Message) -> None:
        self.client.send(topic, messages.encode(Envelope(message, "s", "")))

    def status(self, host: str, content: object, **fields: object) -> None:
        told = {"clock": time.time(), "log": "log", "round": 1, "part": 0, "parts": 1, **fields}
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.say(messages.STATUS, Status(host, f"h-{host}", payload=payload, **told))  # type: ignore[arg-type]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with running_broker(tmp_path) as broker:
        address, credentials = BrokerAddress(broker.host, broker.port), Credentials(broker.login, broker.passcode)
        client = Client(address, credentials, Dialect.STOMP)
        assert client.open() == ""
        yield Site(client, WatchSettings(tmp_path, "embedded", address, credentials))
        client.close()


def vm(name: str, **fields: object) -> dict[str, object]:
    return {"vm": name, "instance": f"g-{name}", "state": "running", "agent": "present", "memory_mb": 256, **fields}


def test_nonsense_on_the_topics_is_counted_and_the_rest_is_seen(site: Site, watching: Callable[..., Watching]) -> None:
    watched = watching(site.settings)
    watched.until(lambda model: any(row["beacons"] == "heard" for _, row in model.brokers))
    site.status("far", {"vms": [vm("good", commands="<b>", cpu_s=float(10**300), memory_mb=True), vm("", instance="")]})
    site.client.send(messages.STATUS, b"\xff\xfe nonsense")
    site.status("far", b"[" * 5000)
    site.status("far", {"vms": "none"})
    site.status("far", b'{"vms": [{"vm": "x", "instance": "g-x", "cpu_s": NaN}]}', round=2)
    site.say(messages.PRESENCE, Status("far", "h-far", 0.0, gone=True))  # a guest would have to say it there
    site.say(messages.STATUS, Beacon("g-good", 1.0))
    site.status("far", {"vms": [vm(HTML, state=HTML), vm("good")]}, round=3, clock=time.time() - 500)
    watched.until(lambda model: any(row["vm"] == HTML for _, row in model.guests))
    site.status("far", {"events": [{"seq": 1, "event": HTML, "text": HTML, "time": time.time() - 500}]}, parts=0)
    watched.until(lambda model: any(event["event"] == HTML for event in model.events))
    rows = {row["vm"]: row for _, row in watched.model.guests}
    assert set(rows) == {HTML, "good"}
    assert rows["good"]["commands"] is None and rows["good"]["memory_mb"] == 256
    assert "refused what came through the broker" in str(list(watched.model.events))
    assert "The clock of far is 500 s behind" in str(watched.model.troubles())
    json.dumps(watched.model.snapshot(), allow_nan=False)


def test_guests_that_no_host_agent_tells_of_are_shown_by_their_beacons(
    site: Site, watching: Callable[..., Watching], monkeypatch: pytest.MonkeyPatch
) -> None:
    from host_agent.monitor import presence

    monkeypatch.setattr(presence, "STATUS_GRACE", 0.0)
    watched = watching(site.settings)
    watched.until(lambda model: any(row["beacons"] == "heard" for _, row in model.brokers))
    beacon = Beacon(
        "g-lone", 60.0, load=0.5, commands=2, memory_bytes=2**26, host="gone", name="lone", agent_version="1.2",
        memory_total_bytes=2**28, cpus=1, cpu_s=10.0, running={"c-1": 30.0, "c-2": 5.0},
    )  # fmt: skip
    site.say(messages.PRESENCE, beacon)
    watched.until(lambda model: len(model.guests) == 1 and len(model.commands) == 2)
    (row,) = (row for _, row in watched.model.guests)
    assert (row["vm"], row["agent_version"], row["memory_mb"], row["image"]) == ("lone", "1.2", 256, None)
    ages = sorted(watched.model.clock() - row["started"] for _, row in watched.model.commands)
    assert ages == pytest.approx([5.0, 30.0], abs=DEADLINE)
    site.say(messages.PRESENCE, attrs.evolve(beacon, commands=1, running={"c-2": 6.0}))
    watched.until(lambda model: len(model.commands) == 1)
    for number in range(presence.MOST_STRANGERS + 50):  # one that would fill the table
        site.say(messages.PRESENCE, Beacon(f"g-{number}", 1.0, host="gone"))
    site.say(messages.PRESENCE, attrs.evolve(beacon, load=7.0))
    watched.until(lambda model: any(row["load"] == 7.0 for _, row in model.guests))
    assert len(watched.model.guests) <= presence.MOST_STRANGERS


def test_a_broker_that_goes_away_is_red_and_nobody_is_called_silent_for_it(
    tmp_path: Path, watching: Callable[..., Watching], monkeypatch: pytest.MonkeyPatch
) -> None:
    from host_agent.monitor import presence

    monkeypatch.setattr(presence, "SILENT_AFTER", 0.5)
    with running_broker(tmp_path) as broker:
        address, credentials = BrokerAddress(broker.host, broker.port), Credentials(broker.login, broker.passcode)
        client = Client(address, credentials, Dialect.STOMP)
        assert client.open() == ""
        site = Site(client, WatchSettings(tmp_path, "embedded", address, credentials))
        watched = watching(site.settings)
        watched.until(lambda model: any(row["beacons"] == "heard" for _, row in model.brokers))
        site.status("far", {"host": {"pid": 1}, "vms": [vm("box")]})
        watched.until(lambda model: len(model.guests) == 1)
        client.close()
    watched.until(lambda model: "Nobody is heard through the broker" in str(model.troubles()))
    time.sleep(1.0)  # longer than SILENT_AFTER
    watched.gatherer.look()
    assert [row["problem"] for _, row in watched.model.hosts] == [""]
    with running_broker(tmp_path, "--max-connections", "5") as again:
        settings = attrs.evolve(site.settings, broker=BrokerAddress(again.host, again.port))
        wrong = watching(attrs.evolve(settings, credentials=Credentials("tester", "wrong")))
        wrong.until(lambda model: "refuses the login 'tester'" in str(model.troubles()))
