"""Commands on the host: their deadlines, signals and ends, without any guest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
from twisted.internet.task import Clock

from common import line_log
from common.broker_address import Credentials
from common.link import Link
from common.messages import Message, Output, Result, Run, Signal
from host_agent.commands import DEADLINE_GRACE, Command, Commands
from host_agent.commits import Commits
from host_agent.guests import Guest, Identity
from host_agent.outbox import Outbox
from host_agent.reconcile import Action, HostView


@attrs.define
class RecordingLink:
    """Keeps what is sent; `acknowledge` is the guest's having got all of it."""

    sent: list[Message] = attrs.field(factory=list)
    waiting: list[Any] = attrs.field(factory=list)

    def send(self, message: Message, acknowledged: Any = None) -> None:
        self.sent.append(message)
        if acknowledged is not None:
            self.waiting.append(acknowledged)

    def acknowledge(self) -> None:
        waiting, self.waiting = self.waiting, []
        for each in waiting:
            each()


@attrs.define
class Place:
    clock: Clock
    link: RecordingLink
    guest: Guest
    commands: Commands

    def run(self, run: Run, stdout: str = "") -> Command:
        """As asked for, and noted on the disk."""
        command = self.commands.run(self.guest, run, stdout)
        self.clock.advance(0)
        return command

    def result(self, command: str, **fields: Any) -> None:
        self.commands.message(self.guest, Result(command, "exited", 0, **fields))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    clock, link = Clock(), RecordingLink()
    as_link: Any = link
    real: Link = as_link
    guest = Guest(Identity.new(Credentials("g", "p")), "box", real)
    (tmp_path / "spools").mkdir()
    outbox = Outbox(tmp_path / "outbox")
    return Place(clock, link, guest, Commands(clock, outbox, Commits(clock, outbox), tmp_path / "spools"))


def test_a_guest_that_cannot_keep_a_deadline_is_not_waited_for(place: Place) -> None:
    command = place.run(Run("c-1", ("true",), deadline_s=100))
    place.clock.advance(100 + DEADLINE_GRACE - 1)
    assert not command.ended
    place.clock.advance(2)
    assert command.result is not None
    assert (command.result.outcome, command.ended) == ("lost", True)
    assert place.link.sent[-1] == Signal("c-1", "KILL")


def test_the_time_of_a_paused_vm_does_not_count_for_a_deadline(place: Place) -> None:
    command = place.run(Run("c-1", ("true",), deadline_s=100))
    place.clock.advance(50)
    place.guest.paused(place.clock.seconds())
    place.clock.advance(10_000)
    place.guest.resumed(place.clock.seconds())
    place.clock.pump([10] * 7)
    assert not command.ended
    place.clock.pump([10] * 10)
    assert command.ended


def test_signals_are_repeated_until_the_guest_has_them(place: Place) -> None:
    command = place.run(Run("c-1", ("true",)))
    place.link.acknowledge()
    place.commands.signal(command, "TERM")
    place.commands.act(Action.RESUME, place.guest, "c-1")
    assert place.link.sent[-1] == Signal("c-1", "TERM")
    place.link.acknowledge()
    place.commands.act(Action.RESUME, place.guest, "c-1")
    assert isinstance(place.link.sent[-1], Run)


def test_a_result_whose_output_is_not_all_there_is_no_result(place: Place) -> None:
    command = place.run(Run("c-1", ("true",)))
    place.commands.message(place.guest, Output("c-1", "stdout", 0, b"abc"))
    place.result("c-1", stdout_bytes=5)
    assert command.result is not None
    assert command.result.outcome == "lost"
    assert "output" in command.result.reason


def test_views_follow_a_commands_life(place: Place) -> None:
    assert place.commands.view("c-1") is HostView.UNKNOWN
    place.run(Run("c-1", ("true",)))
    assert place.commands.view("c-1") is HostView.ASKED
    place.link.acknowledge()
    assert place.commands.view("c-1") is HostView.DELIVERED
    place.result("c-1")
    assert place.commands.view("c-1") is HostView.ENDED


def test_going_back_to_a_snapshot(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    early = place.run(Run("c-early", ("true",)), str(out))
    place.link.acknowledge()
    place.commands.message(place.guest, Output("c-early", "stdout", 0, b"before"))
    mark = place.commands.mark(place.guest)
    place.commands.message(place.guest, Output("c-early", "stdout", 6, b" after"))
    place.result("c-early", stdout_bytes=12)
    late = place.run(Run("c-late", ("true",)))
    assert place.commands.can_roll_back(mark)
    place.commands.roll_back(place.guest, mark, "back to s1", {})
    assert place.commands.view("c-early") is HostView.DELIVERED
    assert (early.result, out.read_bytes()) == (None, b"before")
    assert late.result is not None
    assert (late.result.outcome, late.result.reason) == ("lost", "undone: back to s1")
    place.commands.message(place.guest, Output("c-early", "stdout", 6, b" again"))
    place.result("c-early", stdout_bytes=12)
    assert out.read_bytes() == b"before again"


def test_what_has_ended_is_on_the_disk_before_a_mark_leaves_it_out(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut that took its end away, going back to the mark would undo it."""
    place.run(Run("c-1", ("true",)))
    place.result("c-1")
    flushes: list[int] = []
    monkeypatch.setattr(line_log, "_sync", flushes.append)
    assert place.commands.mark(place.guest) == []
    assert len(flushes) == 1


def test_a_short_programs_result_says_that_it_ran(place: Place) -> None:
    command = place.run(Run("c-1", ("true",)))
    told: list[tuple[str, dict[str, Any]]] = []
    command.watchers.append(lambda name, data: told.append((name, data)))
    place.result("c-1", pid=7, wall_s=0.01)
    assert told == [("started", {"command": "c-1", "pid": 7})]
    assert command.pid == 7
    assert command.started_at is not None and command.ended_at is not None
    assert command.started_at <= command.ended_at - 0.009


def test_what_a_result_acknowledges_is_not_noted_besides(place: Place, tmp_path: Path) -> None:
    place.run(Run("c-1", ("true",)))
    place.result("c-1", pid=7)
    place.link.acknowledge()  # as the link does: after the message that brings it
    place.run(Run("c-2", ("sleep", "1")))
    place.link.acknowledge()
    noted = [(line["id"], line["is"]) for line in line_log.LineLog(tmp_path / "outbox").entries]
    assert noted == [("c-1", "asked"), ("c-1", "ended"), ("c-2", "asked"), ("c-2", "delivered")]


def test_a_request_that_cannot_be_flushed_is_ended(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(line_log, "_sync", fails)
    command = place.run(Run("c-1", ("true",)))
    assert place.link.sent == [command.run, Signal("c-1", "KILL")]
    assert command.result is not None
    assert (command.result.outcome, command.result.reason) == (
        "lost",
        "the outbox of this host agent cannot be written: Input/output error",
    )


def test_a_command_is_sent_at_once_and_answered_when_it_is_on_the_disk(place: Place) -> None:
    command = place.commands.run(place.guest, Run("c-1", ("true",)))
    assert place.link.sent == [command.run]
    told: list[Result] = []
    command.wait().addCallback(told.append)
    place.result("c-1", pid=7, wall_s=0.01)
    assert command.ended
    late: list[Result] = []
    command.wait().addCallback(late.append)
    assert (told, late) == ([], [])
    place.clock.advance(0)
    assert told == late == [command.result]


def test_a_new_session_before_the_flush_asks_again(place: Place) -> None:
    """What was sent in the session before is gone with it."""
    command = place.commands.run(place.guest, Run("c-1", ("true",)))
    place.commands.act(Action.ASK, place.guest, "c-1")
    place.clock.advance(0)
    assert [(type(sent), getattr(sent, "attempt", 0)) for sent in place.link.sent] == [(Run, 1), (Run, 2)]
    assert command.noted


def test_a_signal_follows_its_command(place: Place) -> None:
    command = place.commands.run(place.guest, Run("c-1", ("true",)))
    place.commands.signal(command, "TERM")
    assert place.link.sent == [command.run, Signal("c-1", "TERM")]
