"""Between a command's RUN and its start lies one flush of the journal: what else comes meanwhile is not lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from twisted.internet.task import Clock

from common.messages import Message, Output, Result, Run, Signal
from guest_agent.journal import Journal
from guest_agent.runner import Runner


@attrs.define
class Told:
    """A keeper that only listens, and the link to the host."""

    ops: list[tuple[str, str]] = attrs.field(factory=list)
    said: list[Message] = attrs.field(factory=list)
    congested: bool = False

    def tell(self, head: dict[str, Any]) -> None:
        self.ops.append((head["op"], head.get("id") or " ".join(head["ids"])))

    def send(self, message: Message, acknowledged: Callable[[], None] | None = None) -> None:
        self.said.append(message)


@attrs.define
class Guest:
    clock: Clock
    runner: Runner
    told: Told
    journal: Journal


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    clock, told, journal = Clock(), Told(), Journal(tmp_path / "journal")
    link: Any = told
    runner = Runner(clock, tmp_path, journal, link, lambda: None, {})
    runner.keeper_state(told, "k-1", [])
    return Guest(clock, runner, told, journal)


def test_nothing_starts_before_the_journal_is_flushed(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    guest.runner.run(Run("c-1", ("true",)))
    guest.runner.run(Run("c-2", ("true",)))
    assert guest.told.ops == []
    flushes = []
    monkeypatch.setattr(guest.journal, "flush", lambda: flushes.append(list(guest.told.ops)))
    guest.clock.advance(0)
    assert flushes == [[]], "once for both, and before either"
    assert guest.told.ops == [("spawn", "c-1"), ("spawn", "c-2")]


def test_without_a_flush_a_command_waits_for_nothing(guest: Guest) -> None:
    guest.journal.lasting = False
    guest.runner.run(Run("c-1", ("true",)))
    assert guest.told.ops == [("spawn", "c-1")]
    guest.clock.advance(0)
    assert guest.told.ops == [("spawn", "c-1")]


def test_a_signal_right_behind_its_command(guest: Guest) -> None:
    guest.runner.run(Run("c-1", ("sleep", "1000")))
    guest.runner.signal(Signal("c-1", "KILL"))
    guest.clock.advance(0)
    assert guest.told.ops == [("spawn", "c-1"), ("signal", "c-1")]


def test_a_new_session_before_the_start(guest: Guest) -> None:
    guest.runner.run(Run("c-1", ("echo", "x")))
    guest.runner.new_session()
    guest.runner.run(Run("c-1", ("echo", "x")))
    guest.clock.advance(0)
    assert guest.told.ops == [("spawn", "c-1")]
    guest.runner.kept({"id": "c-1", "op": "output", "stream": "stdout", "offset": 0}, b"x")
    assert guest.told.said == [Output("c-1", "stdout", 0, b"x")]


def test_a_journal_that_cannot_be_flushed(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    guest.runner.run(Run("c-1", ("true",)))
    monkeypatch.setattr(guest.journal, "flush", full)
    guest.clock.advance(0)
    assert guest.told.ops == []
    reason = "the guest's journal cannot be written: No space left on device"
    assert guest.told.said == [Result("c-1", "not_started", reason=reason)]


def test_a_keeper_that_is_lost_before_the_start(guest: Guest) -> None:
    guest.runner.run(Run("c-1", ("true",)))
    guest.runner.keeper_lost()
    guest.clock.advance(0)
    assert guest.told.ops == []
    assert [(type(each), getattr(each, "outcome", "")) for each in guest.told.said] == [(Result, "lost")]


def test_the_host_hears_of_an_end_before_the_journal(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    guest.runner.run(Run("c-1", ("true",)))
    guest.clock.advance(0)
    noted: list[list[Any]] = []
    monkeypatch.setattr(guest.journal, "ended", lambda command, result: noted.append(list(guest.told.said)))
    guest.runner.kept({"id": "c-1", "op": "ended", "pid": 7, "outcome": "exited", "exit_code": 0}, b"")
    result = Result("c-1", "exited", exit_code=0, pid=7)
    assert noted == [[result]]
    assert guest.told.said == [result]
