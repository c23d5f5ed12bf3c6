"""What the monitor makes of what it is told: rows, troubles with their next step, rates; all of it bounded."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from host_agent.monitor import model as model_module
from host_agent.monitor.model import Model


@attrs.define
class Time:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def vm(name: str = "a", **more: Any) -> dict[str, Any]:
    return {"vm": name, "instance": f"g-{name}", "state": "running", "agent": "present", "reason": "", "cpu_s": 1.0,
            "last_seen_s": 1.0, "commands": 0, "memory_mb": 256, **more}  # fmt: skip


def command(**more: Any) -> dict[str, Any]:
    return {"vm": "a", "command": "c-1", "state": "running", "argv": "/bin/work 5", "asked_at": 999.0,
            "started_at": 999.0, "ended_at": None, "deadline_s": 0.0, "outcome": "", "reason": "", "exit_code": None,
            "signal": "", "wall_s": None, **more}  # fmt: skip


def failed(**more: Any) -> dict[str, Any]:
    return command(state="ended", outcome="exited", exit_code=3, **more)


def broker(**more: Any) -> dict[str, Any]:
    return {"kind": "activemq", "name": "b:1", "problem": "", "messages": 0, "memory_bytes": None,
            "memory_limit_bytes": None, "dead_letters": None, "queues": [], **more}  # fmt: skip


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def model(time: Time) -> Model:
    return Model(time)


def only_trouble(model: Model) -> tuple[str, str]:
    (trouble,) = model.troubles()
    assert trouble["todo"]
    return trouble["level"], trouble["what"]


@pytest.mark.parametrize(
    ("told", "level", "what"),
    [
        (vm(state="crashed"), "red", "The VM a ended unexpectedly"),
        (vm(reason="The VM a was powered off by its guest"), "red", "The VM a was powered off by its guest"),
        (vm(agent="silent"), "red", "The agent in a is silent; it was last heard 1 s ago"),
        (
            vm(agent="silent", commands=2),
            "red",
            "The agent in a is silent, with 2 running in it; it was last heard 1 s ago",
        ),
        (vm(agent="gone"), "red", "The agent in a has ended"),
        (vm(last_seen_s=100.0), "amber", "a was last heard 100 s ago"),
    ],
)
def test_what_is_wrong_with_a_guest(model: Model, told: dict[str, Any], level: str, what: str) -> None:
    model.vms("h", [told])
    assert only_trouble(model) == (level, what)


@pytest.mark.parametrize("told", [vm(), vm(state="paused", agent="silent"), vm(state="saved", last_seen_s=9999.0)])
def test_what_is_not_wrong_with_a_guest(model: Model, told: dict[str, Any]) -> None:
    model.vms("h", [told])
    assert model.troubles() == []


def test_a_guest_that_does_not_come_up(model: Model, time: Time) -> None:
    model.vms("h", [vm(state="starting", agent="waiting", last_seen_s=None)])
    assert model.troubles() == []
    time.now += 200
    model.look()
    assert only_trouble(model) == ("amber", "a has been starting for 200 s")


@pytest.mark.parametrize(
    ("told", "level", "what"),
    [
        (failed(ended_at=999.0), "red", "work in a ended with exit code 3"),
        (failed(ended_at=9.0), "amber", "work in a ended with exit code 3"),
        (command(state="ended", outcome="lost", reason="why"), "red", "work in a is lost: why"),
        (command(state="asked", asked_at=900.0), "red", "work in a was asked for 100 s ago and has not started"),
        (command(started_at=910.0, deadline_s=100.0), "amber", "work in a has run 90 s of at most 100 s"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_command(model: Model, told: dict[str, Any], level: str, what: str) -> None:
    model.commands_of("h", [told])
    assert only_trouble(model) == (level, what)


def test_a_slow_command_is_one_that_takes_longer_than_others_of_its_program(model: Model, time: Time) -> None:
    for number in range(3):
        for event in ({"event": "command_asked", "program": "work"},
                      {"event": "command_ended", "outcome": "exited", "exit_code": 0, "wall_s": 30.0}):  # fmt: skip
            model.event("h", {"command": f"c-{number}", "vm": "a", "instance": "g-a", "time": 999.0, **event})
    model.commands_of("h", [command(started_at=920.0)])
    assert model.troubles() == []
    time.now += 15
    model.look()
    assert only_trouble(model) == ("amber", "work in a is slow: 95 s, usually 30 s")


@pytest.mark.parametrize(
    ("told", "what"),
    [
        (broker(problem="login refused"), "The broker activemq b:1 cannot be asked: login refused"),
        (broker(memory_bytes=90, memory_limit_bytes=100), "The broker activemq b:1 uses 90 % of its memory"),
        (broker(queues=[{"name": "q", "messages": 5000, "consumers": 0}]), "q holds 5000 messages"),
        (broker(dead_letters=2), "The broker activemq b:1 has 2 dead letters"),
    ],
)
def test_what_is_wrong_with_a_broker(model: Model, told: dict[str, Any], what: str) -> None:
    model.broker("h", told)
    assert only_trouble(model)[1] == what


def test_an_event_shows_before_the_next_look(model: Model) -> None:
    model.vms("h", [vm()])
    model.changes()
    model.event("h", {"event": "vm_state", "instance": "g-a", "vm": "a", "state": "crashed", "text": "<b>"})
    change = model.changes()
    assert change["tables"]["guests"]["h g-a"]["level"] == "red"
    assert change["troubles"][0]["level"] == "red"
    assert change["events"][0]["text"] == "<b>"


def test_only_what_changed_is_told(model: Model) -> None:
    model.vms("h", [vm("a"), vm("b")])
    assert set(model.changes()["tables"]["guests"]) == {"h g-a", "h g-b"}
    model.vms("h", [vm("a"), vm("b", state="paused")])
    assert set(model.changes()["tables"]["guests"]) == {"h g-b"}
    model.vms("h", [vm("b", state="paused")])
    assert model.changes()["tables"]["guests"] == {"h g-a": None}
    assert model.changes() == {}


def test_cpu_is_a_share_of_the_time_between_two_looks(model: Model, time: Time) -> None:
    model.vms("h", [vm(cpu_s=1.0)])
    time.now += 2
    model.vms("h", [vm(cpu_s=2.0)])
    assert model.guests.rows["h g-a"]["cpu"] == 50


def test_copies_have_rates(model: Model, time: Time) -> None:
    told = {"vm": "a", "copy": "c-9", "direction": "in", "guest_path": "f", "failed": False, "reason": "",
            "ended_at": None, "asked_at": 1000.0, "total_bytes": 100}  # fmt: skip
    model.copies_of("h", [{**told, "bytes": 10}])
    time.now += 2
    model.copies_of("h", [{**told, "bytes": 30}])
    assert model.copies.rows["h c-9"]["rate"] == 10
    assert model.series.step(time.now, 2.0, None)[4] == 15
    time.now += 40
    model.copies_of("h", [{**told, "bytes": 30}])
    assert only_trouble(model) == ("amber", "The copy in of f (a) has not moved for 40 s")


def test_of_a_host_that_does_not_answer_the_last_is_shown(model: Model) -> None:
    model.host("h", {"version": "1"})
    model.vms("h", [vm()])
    model.host_lost("h", "it does not answer")
    assert only_trouble(model) == ("red", "h: it does not answer")
    assert len(model.guests) == 1
    model.host_gone("h")
    assert len(model.hosts) == len(model.guests) == 0


def test_everything_is_bounded(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3000):
        model.event("h", {"event": "checkpoint", "instance": f"g-{number}", "vm": "a", "time": number, "failed": True,
                          "action": "save", "reason": "x", "seconds": 1.0})  # fmt: skip
    change = model.changes()
    assert (len(change["events"]), change["skipped"]) == (model_module.MOST_FRESH, 3000 - model_module.MOST_FRESH)
    assert len(model.events) == model_module.MOST_EVENTS
    assert len(model.checkpoints) <= model_module.MOST_CHECKPOINTS + 1
    assert len(model.troubles()) == model_module.MOST_TROUBLES
    model.vms("h", [vm(f"v{number}") for number in range(model_module.MOST_GUESTS + 10)])
    assert (len(model.guests), model.guests.left_out) == (model_module.MOST_GUESTS, 10)
