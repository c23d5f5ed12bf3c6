"""What a host agent tells monitors elsewhere."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from common import messages
from common.messages import Status
from host_agent.events import EventLog
from host_agent.status import EVENTS_PAUSE, MOST_EVENTS, STATUS_EVERY, StatusReporter, cut

entries = st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=40), max_size=3), max_size=30)


@given(st.dictionaries(st.sampled_from(["vms", "commands", "copies"]), entries), st.integers(10, 300))
def test_a_view_is_whole_when_its_parts_are_put_together(view: dict[str, Any], most: int) -> None:
    parts = list(cut(view, most))
    for name, value in view.items():
        assert [entry for part in parts for entry in part.get(name, [])] == value
    assert all(len(json.dumps(entry)) >= most / 2 or len(part) >= 1 for part in parts for entry in part)


def ended(number: int) -> float | None:
    """Of the first, never; of every other one long ago, of the rest just now."""
    return None if number == 0 else 1.0 if number % 2 else time.time()


def test_events_travel_together_and_everything_now_and_then() -> None:
    clock, sent = Clock(), []
    look: Any = SimpleNamespace(
        host=lambda *_: {"pid": 1},
        all_vms=lambda: [{"vm": "box", "instance": "g-1"}],
        commands=lambda *_: {"commands": [{"command": f"c-{n}", "ended_at": ended(n)} for n in range(900)]},
        copies=lambda *_: {"copies": []},
    )
    events = EventLog(clock)

    def send(destination: str, body: bytes) -> None:
        assert destination == messages.STATUS
        message = messages.decode(body).message
        assert isinstance(message, Status)
        sent.append(message)

    reporter = StatusReporter(clock, "lab-1", "h-1", look, events, send)
    reporter.start()
    (view,) = sent
    told = json.loads(view.payload)
    assert (view.host, view.agent, view.parts, told["vms"][0]["vm"]) == ("lab-1", "h-1", 1, "box")
    assert told["commands"][0]["command"] == "c-0" and len(told["commands"]) == 101
    assert all(each["ended_at"] != 1.0 for each in told["commands"]) and told["events"] == []
    for number in range(MOST_EVENTS + 50):
        events({"event": "vm_state", "log_time": 1.0, "log_format": "{n}", "n": number})
    assert len(sent) == 1
    clock.advance(EVENTS_PAUSE)
    assert all(each.parts == 0 for each in sent[1:])
    assert sum(len(json.loads(each.payload)["events"]) for each in sent[1:]) == MOST_EVENTS
    del sent[:]
    clock.advance(STATUS_EVERY)
    assert len(sent) == 1 and sent[0].round == view.round + 1
    assert "events" not in json.loads(sent[0].payload)
    clock.pump([STATUS_EVERY] * 5)
    assert len(json.loads(sent[-1].payload)["events"]) == 30
    reporter.stop()
    assert sent[-1].gone
    clock.advance(100)
    assert sent[-1].gone and not clock.getDelayedCalls()
