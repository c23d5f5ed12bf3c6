"""The numbered events of a host agent: bounded, in order, and told to those who wait."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import Logger

from host_agent.events import MOST_IN_A_BATCH, MOST_TEXT, MOST_WAITERS, EventLog, Happened, TooManyWaiters

log = Logger()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def events(clock: Clock) -> Iterator[EventLog]:
    made = EventLog(clock, most=2000)
    made.start()
    yield made
    made.stop()


def happen(number: int = 0, **more: Any) -> None:
    log.info("{vm} {number}", event=Happened.VM_STATE, vm="a", number=number, **more)


def wait(events: EventLog, since: int, seconds: float = 30, name: str = "") -> tuple[list[Any], Deferred[None]]:
    got: list[Any] = []
    return got, Deferred.fromCoroutine(events.wait(name, since, seconds)).addCallback(got.append)


def test_an_event_is_a_log_event_with_a_name_that_we_know(events: EventLog) -> None:
    log.info("nothing to see")
    log.info("not ours", event="something_else")
    happen(7, thing=object(), text="cannot be had twice", reason="x" * 10_000)
    (event,) = events.since(0)["events"]
    assert (event["seq"], event["event"], event["level"], event["vm"]) == (1, "vm_state", "info", "a")
    assert event["text"] == "a 7"
    assert "thing" not in event
    assert len(event["reason"]) == MOST_TEXT


def test_numbers_go_on_and_what_is_lost_is_counted(events: EventLog) -> None:
    for number in range(2500):
        happen(number)
    first = events.since(0)
    assert first["lost"] == 500
    assert [event["seq"] for event in first["events"]] == list(range(501, 501 + MOST_IN_A_BATCH))
    second = events.since(first["last"])
    assert (second["lost"], second["last"]) == (0, 2500)
    assert events.since(2500) == {"log": events.id, "events": [], "last": 2500, "lost": 0}


def test_a_batch_is_bounded_in_bytes(events: EventLog) -> None:
    for number in range(1500):
        happen(number, **{f"field{each}": "x" * 500 for each in range(4)})
    assert 100 < len(events.since(0)["events"]) < 300


def test_who_waits_is_told_at_once_or_after_the_time(events: EventLog, clock: Clock) -> None:
    got, _ = wait(events, 0)
    assert not got
    happen(1)
    clock.advance(0)
    assert [event["number"] for event in got[0]["events"]] == [1]
    late, _ = wait(events, 1, seconds=5)
    clock.advance(5)
    assert late == [{"log": events.id, "events": [], "last": 1, "lost": 0}]


def test_from_now_on_and_after_another_life(events: EventLog) -> None:
    for number in range(3):
        happen(number)
    assert wait(events, -1, 0)[0][0] == {"log": events.id, "events": [], "last": 3, "lost": 0}
    # Numbers of an agent that was there before mean nothing: everything is new.
    assert len(wait(events, 2, 0, name="of-before")[0][0]["events"]) == 3
    assert len(wait(events, 2, 0, name=events.id)[0][0]["events"]) == 1


def test_not_everybody_can_wait(events: EventLog) -> None:
    waiting = [wait(events, 0) for _ in range(MOST_WAITERS)]
    errors: list[Any] = []
    wait(events, 0)[1].addErrback(errors.append)
    assert errors[0].check(TooManyWaiters)
    events.stop()
    assert waiting


def test_listeners_hear_everything(events: EventLog) -> None:
    heard: list[dict[str, Any]] = []
    events.listeners.append(heard.append)
    happen(1)
    assert heard == events.since(0)["events"]
