"""Requests and confirmations wait for the outbox's flush, and share it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from common import line_log
from common.broker_address import Credentials
from common.messages import Confirm, Message
from host_agent.commits import CONFIRM_AFTER, CONFIRM_MOST, SLOW, Commits
from host_agent.guests import Guest, Identity
from host_agent.outbox import Outbox


@attrs.define
class Sent:
    """In the place of a link."""

    messages: list[Message] = attrs.field(factory=list)

    def send(self, message: Message) -> None:
        self.messages.append(message)


@attrs.define
class Place:
    clock: Clock
    outbox: Outbox
    commits: Commits
    guest: Guest
    sent: Sent
    flushes: list[int]
    failure: OSError | None = None
    seconds: float = 0.0  # that a flush takes

    def ask(self, name: str) -> list[OSError | None]:
        told: list[OSError | None] = []
        self.outbox.asked({"is": "asked", "id": name, "guest": self.guest.id, "run": {}})
        self.commits.after_flush(told.append)
        return told


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    clock, outbox, sent = Clock(), Outbox(tmp_path / "outbox"), Sent()
    link: Any = sent
    guest = Guest(Identity.new(Credentials("g", "p")), "box", link, session="s-1")
    made = Place(clock, outbox, Commits(clock, outbox), guest, sent, [])

    def sync(descriptor: int) -> None:
        if made.failure is not None:
            raise made.failure
        made.flushes.append(descriptor)
        if made.seconds:
            clock.advance(made.seconds)

    monkeypatch.setattr(line_log, "_sync", sync)
    return made


def test_requests_of_one_turn_share_a_flush_and_wait_for_it(place: Place) -> None:
    told = [place.ask(f"c-{number}") for number in range(10)]
    assert not any(told)
    place.clock.advance(0)
    assert told == [[None]] * 10
    assert len(place.flushes) == 1


def test_a_request_that_cannot_be_flushed_is_told_why(place: Place) -> None:
    place.failure = OSError(5, "Input/output error")
    told = place.ask("c-1")
    place.clock.advance(0)
    assert told == [place.failure]


def test_results_are_confirmed_together_and_after_a_flush(place: Place) -> None:
    for number in range(5):
        (record,) = [place.outbox.asked({"is": "asked", "id": f"c-{number}", "guest": "g"})]
        place.outbox.ended(record, {"outcome": "exited"})
        place.commits.confirm(place.guest, f"c-{number}")
    assert not place.sent.messages and not place.flushes
    place.clock.advance(CONFIRM_AFTER)
    assert place.sent.messages == [Confirm(("c-0", "c-1", "c-2", "c-3", "c-4"))]
    assert len(place.flushes) == 1


def test_many_results_do_not_wait(place: Place) -> None:
    for number in range(CONFIRM_MOST):
        place.commits.confirm(place.guest, f"c-{number}")
    place.clock.advance(0)
    assert len(place.sent.messages) == 1
    place.clock.advance(CONFIRM_AFTER)
    assert len(place.sent.messages) == 1


def test_nothing_is_confirmed_in_another_session(place: Place) -> None:
    """The guest may have been restored since, and run the very same command again."""
    place.commits.confirm(place.guest, "c-1")
    place.guest.session = "s-2"
    place.commits.confirm(place.guest, "c-2")
    place.clock.advance(CONFIRM_AFTER)
    assert place.sent.messages == [Confirm(("c-2",))]


def test_nothing_is_confirmed_that_is_not_on_the_disk(place: Place) -> None:
    place.failure = OSError(5, "Input/output error")
    place.outbox.ended(place.outbox.asked({"is": "asked", "id": "c-1", "guest": "g"}), {})
    place.commits.confirm(place.guest, "c-1")
    place.clock.advance(CONFIRM_AFTER)
    assert not place.sent.messages


def test_at_the_end_what_waits_is_confirmed(place: Place) -> None:
    place.commits.confirm(place.guest, "c-1")
    place.commits.stop()
    assert place.sent.messages == [Confirm(("c-1",))]


def test_what_comes_during_a_flush_shares_the_next(place: Place) -> None:
    """One that is slow is a thread's; lines that are added meanwhile are not taken for flushed."""
    works: list[tuple[Any, Deferred[None]]] = []

    def in_thread(work: Any) -> Deferred[None]:
        works.append((work, Deferred()))
        return works[-1][1]

    place.commits = Commits(place.clock, place.outbox, in_thread)
    place.seconds = 2 * SLOW
    place.ask("c-0")
    place.clock.advance(0)
    assert (len(works), len(place.flushes)) == (0, 1)
    place.flushes.clear()
    first = place.ask("c-1")
    place.clock.advance(0)
    second, third = place.ask("c-2"), place.ask("c-3")
    place.clock.advance(0)
    assert len(works) == 1
    works[0][0]()
    works[0][1].callback(None)
    assert (first, second, third) == ([None], [], [])
    assert len(works) == 2
    works[1][0]()
    works[1][1].callback(None)
    place.clock.advance(0)
    assert (second, third) == ([None], [None])
    assert (len(works), len(place.flushes)) == (2, 2)
    place.seconds = 0.0
    place.ask("c-4")
    place.clock.advance(10 * SLOW)  # until the thread begins, and until the reactor hears of its end
    works[2][0]()
    place.clock.advance(10 * SLOW)
    works[2][1].callback(None)
    place.ask("c-5")
    place.clock.advance(0)
    assert (len(works), len(place.flushes)) == (3, 4)  # it is quick again, and waited for


def test_a_flush_outlives_the_replacement_of_its_file(place: Place) -> None:
    place.ask("c-1")
    work = place.outbox.begin_flush()
    assert work is not None
    place.outbox._log.rewrite([])
    place.ask("c-2")
    work()
    assert place.outbox.begin_flush() is not None  # for the second
