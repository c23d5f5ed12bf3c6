"""The link: whatever is lost, repeated or reordered, numbered messages arrive in order and once."""

from __future__ import annotations

import random
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock

from common import messages
from common.link import ACK_AFTER, RESEND_AFTER, RESEND_MOST, WINDOW_MESSAGES, Link
from common.messages import Confirm, Message, Output, Ping


class Wire:
    """Two links and everything that is on its way between them."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.to_host: list[bytes] = []
        self.to_guest: list[bytes] = []
        self.host_got: list[Message] = []
        self.guest_got: list[Message] = []
        self.host = Link(self.clock, "hhhh", self.to_guest.append, self.host_got.append)
        self.guest = Link(self.clock, "gggg", self.to_host.append, self.guest_got.append)

    def open(self) -> None:
        self.host.open(self.guest.session)
        self.guest.open(self.host.session)

    def carry(self, lose: Callable[[], bool] = lambda: False) -> None:
        """Deliver what is on its way, until nothing is."""
        while self.to_host or self.to_guest:
            for bodies, link in ((self.to_host, self.host), (self.to_guest, self.guest)):
                waiting, bodies[:] = list(bodies), []
                for body in waiting:
                    if not lose():
                        link.received(messages.decode(body))


def test_an_acknowledgement_waits_for_a_message_from_its_own_beginning_on() -> None:
    wire = Wire()
    wire.open()

    def told_in(seconds: float) -> list[Message]:
        wire.clock.advance(seconds)
        told = [messages.decode(body).message for body in wire.to_host]
        wire.carry()
        return told

    wire.host.send(Confirm(("c-1",)))
    wire.carry()
    wire.clock.advance(0.1)
    wire.guest.send(Output("c-1", "stdout", 0))  # has carried it
    assert told_in(0) == [Output("c-1", "stdout", 0)]
    wire.clock.advance(0.1)
    wire.host.send(Confirm(("c-2",)))
    wire.carry()
    assert told_in(ACK_AFTER - 0.01) == [], "the first one's time has come, which is over"
    assert told_in(0.02) == [messages.Ack()]
    wire.clock.advance(10 * RESEND_MOST)
    assert not wire.clock.getDelayedCalls(), "an idle link wakes nobody"


def test_a_message_is_taken_before_the_acknowledgement_that_it_brings() -> None:
    wire = Wire()
    wire.open()
    told: list[object] = []
    wire.host._deliver = told.append
    wire.host.send(Ping("n"), lambda: told.append("never"))
    wire.host.send(Confirm(("c-1",)), lambda: told.append("acknowledged"))
    wire.carry()
    wire.guest.send(Output("c-1", "stdout", 0))
    wire.carry()
    assert told == [Output("c-1", "stdout", 0), "acknowledged"]


def test_what_ends_the_session_brings_no_acknowledgement_to_the_next() -> None:
    wire = Wire()
    wire.open()
    acknowledged: list[str] = []

    def restore(message: Message) -> None:
        wire.host.renew("hhh2")
        wire.host.open("ggg2")
        wire.host.send(Confirm(("c-2",)), lambda: acknowledged.append("a message of the next session"))

    wire.host._deliver = restore
    wire.host.send(Confirm(("c-1",)))
    wire.carry()
    wire.guest.send(Output("c-1", "stdout", 0))
    wire.carry()
    assert not acknowledged
    assert wire.host.unacknowledged == 1


def confirms(count: int) -> list[Confirm]:
    return [Confirm((f"c-{number}",)) for number in range(count)]


def test_messages_arrive_in_order_and_are_acknowledged() -> None:
    wire = Wire()
    wire.open()
    acknowledged: list[int] = []
    for number, message in enumerate(confirms(200)):
        wire.host.send(message, lambda number=number: acknowledged.append(number))  # type: ignore[misc]
    assert wire.host.congested  # more than the window
    for _ in range(100):
        wire.carry()
        wire.clock.advance(0.05)
    assert wire.guest_got == confirms(200)
    assert acknowledged == list(range(200))
    assert wire.host.unacknowledged == 0


def test_at_most_a_window_is_on_its_way() -> None:
    wire = Wire()
    wire.open()
    for message in confirms(500):
        wire.host.send(message)
    assert len(wire.to_guest) == WINDOW_MESSAGES


def test_without_a_session_nothing_is_sent_and_producers_pause() -> None:
    wire = Wire()
    assert wire.host.congested
    wire.host.send(Confirm(("c-0",)))
    wire.open()
    wire.host.send(Confirm(("c-1",)))
    wire.carry()
    assert wire.guest_got == [Confirm(("c-1",))]
    assert not wire.host.congested


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.floats(0, 0.4))
def test_losses_repeats_and_reordering_change_nothing(seed: int, loss: float) -> None:
    chance = random.Random(seed)
    wire = Wire()
    wire.open()
    sent = confirms(20)
    for message in sent:
        wire.host.send(message)
        wire.guest.send(message)
    for _ in range(2000):
        wire.to_guest += [body for body in wire.to_guest if chance.random() < 0.2]
        for bodies in (wire.to_host, wire.to_guest):
            if len(bodies) > 1 and chance.random() < 0.5:
                place = chance.randrange(len(bodies) - 1)
                bodies[place], bodies[place + 1] = bodies[place + 1], bodies[place]
        wire.carry(lambda: chance.random() < loss)
        wire.clock.advance(RESEND_MOST)
        if len(wire.guest_got) == len(wire.host_got) == len(sent):
            break
    assert wire.guest_got == sent
    assert wire.host_got == sent


def test_a_reconnection_sends_again_at_once() -> None:
    wire = Wire()
    wire.open()
    wire.host.send(Confirm(("c-0",)))
    wire.to_guest.clear()  # lost with the connection
    wire.open()
    wire.carry()
    assert wire.guest_got == [Confirm(("c-0",))]


def test_a_new_session_of_the_peer_starts_the_numbering_anew() -> None:
    wire = Wire()
    wire.open()
    wire.host.send(Confirm(("c-old",)))
    wire.carry()
    old, wire.to_guest[:] = list(wire.to_guest), []
    wire.guest = Link(wire.clock, "gggg2", wire.to_host.append, wire.guest_got.append)
    assert wire.host.open("gggg2")
    wire.guest.open(wire.host.session)
    wire.host.send(Confirm(("c-new",)))
    wire.to_guest[:0] = old  # an echo of the old session
    wire.carry()
    assert wire.guest_got == [Confirm(("c-old",)), Confirm(("c-new",))]


def test_unnumbered_messages_come_as_they_come() -> None:
    wire = Wire()
    wire.open()
    wire.host.send(Ping("n"))
    wire.carry()
    assert wire.guest_got == [Ping("n")]


def test_a_fast_stream_is_acknowledged_without_waiting_for_the_timer() -> None:
    wire = Wire()
    wire.open()
    for number in range(4):
        wire.guest.send(Output("c", "stdout", number * 65536, b"x" * 65536))
    wire.carry()
    assert wire.guest.unacknowledged <= 2  # time has not moved


def test_an_acknowledgement_waits_for_a_message_to_carry_it_and_is_there_long_before_all_is_sent_again() -> None:
    wire = Wire()
    wire.open()
    wire.host.send(Confirm(("c-0",)))
    wire.carry()
    wire.clock.advance(ACK_AFTER * 0.9)
    wire.guest.send(Output("c", "stdout", 0, b"x"))
    assert len(wire.to_host) == 1
    wire.carry()
    wire.clock.advance(ACK_AFTER * 0.2)
    assert wire.host.unacknowledged == 0 and not wire.to_host
    wire.clock.advance(RESEND_AFTER / 2)  # for the host's, on the way to the guest: alone
    assert len(wire.to_guest) == 1 and not wire.to_host


def test_a_closed_link_leaves_no_timer() -> None:
    wire = Wire()
    wire.open()
    wire.host.send(Confirm(("c-0",)))
    wire.carry()
    wire.host.close()
    wire.guest.close()
    assert not wire.clock.getDelayedCalls()
