"""Epochs: what a guest said before it was restored or rebooted is never taken for its present view."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import pytest
from twisted.internet.task import Clock

from common import messages
from common.broker_address import Credentials
from common.link import new_session
from common.messages import ENDED, RUNNING, Envelope, Hello, Message, Result, Welcome
from host_agent.guests import Guest, GuestListener, Guests, Identity, Presence


@attrs.define
class Listener(GuestListener):
    sessions: list[dict[str, str]] = attrs.field(factory=list)
    messages: list[Message] = attrs.field(factory=list)

    def guest_message(self, guest: Guest, message: Message) -> None:
        self.messages.append(message)

    def guest_session(self, guest: Guest, held: Mapping[str, str]) -> None:
        self.sessions.append(dict(held))


class Host:
    def __init__(self) -> None:
        self.sent: list[Envelope] = []
        self.listener = Listener()
        self.epochs: list[int] = []
        self.guests = Guests(
            Clock(),
            "h-1",
            lambda destination, body: self.sent.append(messages.decode(body)),
            self.listener,
            lambda guest: self.epochs.append(guest.epoch),
        )
        self.guest = self.guests.expect(Identity.new(Credentials("g", "passcode")), "box")

    def hello(self, session: str, epoch: int, boot: str = "b1", held: dict[str, str] | None = None) -> Welcome:
        """What the guest says, and the WELCOME that answers it."""
        proof = messages.proof_of(self.guest.identity.secret, self.guest.id, session)
        hello = Hello(self.guest.id, boot, proof, "1", epoch, commands=held or {})
        self.guests.received(messages.encode(Envelope(hello, session, "")))
        answer = self.sent[-1]
        assert answer.receiver in (session, "")
        assert isinstance(answer.message, Welcome)
        return answer.message

    def result(self, session: str) -> None:
        receiver = self.guest.link.session
        self.guests.received(messages.encode(Envelope(Result("c-1", "exited", 0), session, receiver, 1)))


def test_a_link_opens_in_the_present_epoch_only() -> None:
    host = Host()
    session = new_session()
    first = host.hello(session, 0)
    assert (first.opened, first.epoch) == (False, 1)
    assert not host.listener.sessions
    second = host.hello(session, 1, held={"c-1": RUNNING})
    assert second.opened
    assert host.listener.sessions == [{"c-1": RUNNING}]


def test_a_repeated_hello_does_not_open_it_again() -> None:
    host = Host()
    session = new_session()
    for _ in range(3):
        assert host.hello(session, 1).opened
    assert len(host.listener.sessions) == 1


def test_after_a_restore_the_old_session_counts_no_more() -> None:
    host = Host()
    session = new_session()
    host.hello(session, 1)
    host.guests.restored(host.guest)
    assert host.epochs[-1] == 2
    host.result(session)  # said before the restore, delivered late
    assert not host.listener.messages
    stale = host.hello(session, 1, held={"c-1": ENDED})  # so is this
    assert (stale.opened, stale.epoch) == (False, 2)
    assert len(host.listener.sessions) == 1
    assert host.hello(new_session(), 2, held={"c-1": RUNNING}).opened
    assert host.listener.sessions[-1] == {"c-1": RUNNING}


def test_another_boot_is_another_epoch() -> None:
    host = Host()
    host.hello(new_session(), 1, boot="b1")
    after = host.hello(new_session(), 0, boot="b2")
    assert (after.opened, after.epoch) == (False, 2)
    assert host.hello(new_session(), 2, boot="b2").opened


def test_a_stale_hello_of_an_older_boot_heals_itself() -> None:
    """It makes one more epoch, and the guest is called to say HELLO in it."""
    host = Host()
    host.hello(new_session(), 1, boot="b1")
    session = new_session()
    host.hello(session, 0, boot="b2")
    host.hello(session, 2, boot="b2")
    host.hello(new_session(), 1, boot="b1")
    called = [sent for sent in host.sent if sent.receiver == ""]
    assert isinstance(called[-1].message, Welcome) and not called[-1].message.opened
    host.hello(session, called[-1].message.epoch, boot="b2")
    assert host.hello(new_session(), host.guest.epoch, boot="b2").opened


def test_a_hello_without_the_secret_changes_nothing() -> None:
    host = Host()
    hello = Hello(host.guest.id, "b1", "0" * 64, "1", 1)
    host.guests.received(messages.encode(Envelope(hello, new_session(), "")))
    assert not host.sent
    assert host.guest.boot == ""


def presence(guest: Guest) -> Presence:
    """As it is now: not as a type checker remembers it."""
    return guest.presence


def test_who_could_not_listen_calls_nobody_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its broker, or after a sleep of its own, a host agent waits for the next word."""
    host = Host()
    now = [1000.0]
    monkeypatch.setattr("host_agent.guests.time.monotonic", lambda: now[0])

    def pass_time(seconds: int) -> None:
        for _ in range(seconds // 5):
            now[0] += 5
            host.guests._look_for_silence()

    host.guests.broker_connected()
    pass_time(5)
    host.hello(new_session(), 1)
    guest = host.guest
    assert presence(guest) is Presence.PRESENT
    host.guests.broker_lost()
    pass_time(600)
    host.guests.broker_connected()
    pass_time(30)
    assert presence(guest) is Presence.PRESENT
    assert guest.silent_for() == 30
    now[0] += 600  # the computer, or this process, stood still
    pass_time(30)
    assert presence(guest) is Presence.PRESENT
    pass_time(30)
    assert presence(guest) is Presence.SILENT
