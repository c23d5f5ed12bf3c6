"""Hosts and guests that are heard through a broker: what is made of their words, and of their silence."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import messages
from common.errors import ProtocolError
from common.messages import Beacon, Envelope, Message, Status
from host_agent.metrics import Metrics
from host_agent.monitor import presence, told
from host_agent.monitor.listener import Heard
from host_agent.monitor.model import Model
from host_agent.monitor.presence import SILENT_AFTER, STATUS_GRACE, Presence

from .test_model import Time, command, vm

BROKER = "b:1"
METRICS = Metrics()


@attrs.define
class Air:
    """A broker that is listened to, and a clock."""

    time: Time = attrs.field(factory=Time)
    here: list[str] = attrs.field(factory=list)
    model: Model = attrs.field(init=False)
    presence: Presence = attrs.field(init=False)
    metrics: Metrics = attrs.field(factory=Metrics)
    round: int = 0

    def __attrs_post_init__(self) -> None:
        self.model = Model(self.time)
        self.presence = Presence(self.model, self.metrics, lambda: self.here, self.time)
        self.hear()

    def hear(self, *said: tuple[str, Message | bytes], connected: bool = True, connections: int = 1) -> None:
        bodies = [
            (topic, each if isinstance(each, bytes) else messages.encode(Envelope(each, "s", "")))
            for topic, each in said
        ]
        problem = "" if connected else "cannot be reached"
        self.presence.heard(BROKER, "activemq", Heard(bodies, 0, connected, connections, problem))

    def status(self, host: str = "far", content: Any = None, **fields: Any) -> None:
        self.round += 1
        default = {"host": {"pid": 1}, "vms": [vm("box")]}
        more = {"clock": self.time.now, "log": "log", "round": self.round, "parts": 1, **fields}
        payload = json.dumps(default if content is None else content).encode()
        self.hear((messages.STATUS, Status(host, f"h-{host}", payload=payload, **more)))

    def beacon(self, guest: str = "g-box", host: str = "far", **fields: Any) -> None:
        self.hear((messages.PRESENCE, Beacon(guest, 1.0, host=host, **fields)))

    def passes(self, seconds: float) -> None:
        self.time.now += seconds
        self.presence.look()
        self.model.look()

    def guest(self, name: str = "box") -> dict[str, Any]:
        return next(row for _, row in self.model.guests if row["vm"] == name)

    def what(self) -> list[str]:
        return [each["what"] for each in self.model.troubles()]


@pytest.fixture
def air() -> Air:
    return Air()


def test_silence_of_a_host_agent_is_red_and_of_its_guests_follows(air: Air) -> None:
    air.status()
    assert air.what() == []
    air.passes(SILENT_AFTER + 5)
    host, guest = air.what()
    assert host.startswith("far: silent for 40 s") and guest == "box is not heard, as its host agent far is silent"
    assert 'vmwrapper_host_agent_up{host="far"} 0.0' in air.metrics.text().decode()
    air.status()
    assert air.what() == []


@pytest.mark.parametrize(
    ("consumers", "words"),
    [(1, "its connection to the broker is there: it hangs"), (0, "no connection of it"), (None, "")],
)
def test_the_brokers_statistics_tell_a_hang_from_a_death(air: Air, consumers: int | None, words: str) -> None:
    queues = [{"name": "vmwrapper.host.far", "messages": 0, "consumers": consumers}]
    air.model.broker("broker", {"kind": "activemq", "name": BROKER, "problem": "", "memory_bytes": None,
                                "memory_limit_bytes": None, "dead_letters": None, "queues": queues})  # fmt: skip
    air.status()
    air.passes(SILENT_AFTER + 1)
    assert words in air.what()[0]
    assert air.what()[0].endswith("it hangs") == (consumers == 1)


def test_guests_that_are_heard_show_that_their_machine_is_up(air: Air) -> None:
    air.status()
    for _ in range(5):
        air.passes(10)
        air.beacon(commands=1, running={"c-1": 30.0})
    air.passes(1)
    (what,) = air.what()
    assert "1 guest of it is still heard, so its machine is up" in what
    (row,) = (row for _, row in air.model.commands)
    assert (row["command"], row["vm"], air.time.now - row["started"]) == (
        "c-1",
        "g-box",
        30.0 + 11,
    )  # first told at 1040


def test_nobody_is_silent_while_we_are_deaf(air: Air) -> None:
    air.status()
    air.hear(connected=False)
    air.passes(1000)
    assert [what for what in air.what() if "silent" in what] == []
    assert air.what() == [f"Nobody is heard through the broker activemq {BROKER}: it cannot be reached"]
    air.hear(connections=2)
    air.passes(SILENT_AFTER - 1)
    assert air.what() == []
    air.passes(2)
    assert "silent" in air.what()[0]


def test_a_view_in_parts_counts_when_it_is_whole(air: Air) -> None:
    air.status(content={"host": {}, "vms": [vm("a")]}, round=7, part=0, parts=2)
    assert len(air.model.guests) == 0
    air.status(content={"vms": [vm("b")]}, round=7, part=1, parts=2)
    assert len(air.model.guests) == 2
    air.status(content={"host": {}, "vms": [vm("a")]}, round=8, part=0, parts=2)  # its other part is lost
    air.status(content={"host": {}, "vms": [vm("b")]}, round=9)
    assert [row["vm"] for _, row in air.model.guests] == ["b"]


def test_an_event_is_taken_once_and_of_a_new_life_anew(air: Air) -> None:
    def event(number: int) -> dict[str, Any]:
        return {"seq": number, "event": "command_started", "text": "x", "time": 1.0, "command": "c-1", "vm": "box"}

    for content in ({"events": [event(1), event(2)]}, {"events": [event(2), event(3)]}):
        air.status(content=content, parts=0)
    assert len(air.model.events) == 3
    air.status(content={"events": [event(1)]}, parts=0, log="another")
    assert len(air.model.events) == 4
    checkpoint = {"seq": 3, "event": "checkpoint", "vm": "box", "instance": "g-box", "time": 5.0, "action": "snapshot",
                  "seconds": 0.5}  # fmt: skip
    for _ in range(2):
        air.status(content={"host": {}, "vms": [vm("box")], "checkpoints": [checkpoint]})
    assert len(air.model.checkpoints) == 1


def test_a_clock_that_is_wrong_makes_no_age_wrong(air: Air) -> None:
    content = {"host": {}, "vms": [vm("box")], "commands": [command(started_at=100.0, asked_at=100.0)]}
    air.status(content=content, clock=130.0)
    (row,) = (row for _, row in air.model.commands)
    assert air.time.now - row["started"] == pytest.approx(30.0)
    assert air.what() == ["The clock of far is 870 s behind"]
    row_before = row
    air.status(content=content, clock=130.4)  # the message took another time
    (row,) = (row for _, row in air.model.commands)
    assert row == row_before


def test_a_host_agent_that_is_seen_here_is_not_shown_twice(air: Air) -> None:
    air.passes(STATUS_GRACE + 1)
    air.beacon()
    assert len(air.model.guests) == 1
    air.here.append("h-far")
    air.status()
    air.beacon()
    assert len(air.model.guests) == 0 and len(air.model.hosts) == 0


def test_a_goodbye_is_the_end(air: Air) -> None:
    air.status()
    air.status(gone=True)
    assert len(air.model.hosts) == 0 and len(air.model.guests) == 0


def test_a_guest_cannot_speak_for_its_host(air: Air) -> None:
    air.status()
    for topic, message in (
        (messages.PRESENCE, Status("far", "h-far", 1.0, gone=True)),
        (messages.STATUS, Beacon("g-box", 1.0, host="far")),
        (messages.PRESENCE, b"nonsense"),
        (messages.PRESENCE, messages.Bye("g-box")),
    ):
        air.hear((topic, message))
    assert len(air.model.guests) == 1 and len(air.model.hosts) == 1
    assert len(air.model.events) == 1  # it is said once in a while, with the count
    assert 'vmwrapper_refused_messages_total{host="b:1"} 4.0' in air.metrics.text().decode()


def test_everything_is_bounded(air: Air, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "MOST_HOSTS", 3)
    monkeypatch.setattr(presence, "MOST_STRANGERS", 3)
    air.passes(STATUS_GRACE + 1)
    for number in range(10):
        air.status(f"far-{number}")
        air.beacon(f"g-{number}", host="nobody")
    assert len(air.model.hosts) == 3
    assert sum(row["host"] == "nobody" for _, row in air.model.guests) == 3
    air.passes(presence.FORGET_AFTER + 1)
    assert len(air.model.hosts) == 0 and len(air.model.guests) == 0


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=9,
)
fields = st.sampled_from(["vm", "instance", "command", "copy", "state", "cpu_s", "seq", "time", "event", "started_at"])
rows = st.lists(st.dictionaries(fields, values, max_size=6) | values, max_size=4)


@given(st.dictionaries(st.sampled_from(["host", *told.LISTS]), rows | values, max_size=6), st.floats(-1e6, 1e6))
def test_whatever_a_host_tells_is_refused_or_shown(content: dict[str, Any], shift: float) -> None:
    model = Model(Time())
    try:
        view = told.read(json.dumps(content).encode(), shift)
    except ProtocolError:
        return
    model.host("far", view.host or {})
    model.vms("far", view.vms)
    model.commands_of("far", view.commands)
    model.copies_of("far", view.copies)
    for each in view.checkpoints:
        model.checkpoint("far", each)
    for each in view.events:
        model.event("far", each)
        METRICS.event("far", each)
    METRICS.vms("far", view.vms)
    model.look()
    json.dumps(model.snapshot(), allow_nan=False)
