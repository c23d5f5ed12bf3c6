"""The host agent's own way into the embedded broker, against a client that comes over the wire."""

from __future__ import annotations

import attrs

from host_agent.broker.local import LocalLink
from tests.unit.broker.harness import Harness


@attrs.define
class Events:
    connects: int = 0
    messages: list[tuple[str, bytes]] = attrs.field(factory=list)

    def broker_connected(self) -> None:
        self.connects += 1

    def broker_disconnected(self, reason: str) -> None:
        raise AssertionError(reason)

    def broker_message(self, destination: str, body: bytes) -> None:
        self.messages.append((destination, body))


def joined() -> tuple[Harness, LocalLink, Events]:
    harness, events = Harness(), Events()
    link = LocalLink(harness.clock, harness.broker, ["/queue/host", "/topic/news"], events)
    link.start()
    harness.advance(0)
    assert events.connects == 1
    return harness, link, events


def test_both_directions() -> None:
    harness, link, events = joined()
    guest = harness.client().subscribe("/queue/guest")
    assert link.send("/queue/guest", b"for \0 the guest\n\nwhole")
    harness.advance(0)
    assert guest.bodies() == [b"for \0 the guest\n\nwhole"]
    guest.publish("/queue/host", b"one\n\ntwo\0", b"")
    guest.publish("/topic/news", b"news")
    harness.advance(0)
    assert events.messages == [("/queue/host", b"one\n\ntwo\0"), ("/queue/host", b""), ("/topic/news", b"news")]


def test_what_waited_before_is_taken() -> None:
    harness, events = Harness(), Events()
    harness.client().publish("/queue/host", b"early")
    LocalLink(harness.clock, harness.broker, ["/queue/host"], events).start()
    harness.advance(0)
    assert events.messages == [("/queue/host", b"early")]


def test_a_link_that_was_stopped_takes_and_sends_nothing() -> None:
    harness, link, events = joined()
    link.stop()
    harness.client().publish("/queue/host", b"late")
    harness.advance(0)
    assert not events.messages
    assert not link.send("/queue/guest", b"late")


def test_an_impossible_destination_is_lost_like_any_message() -> None:
    _, link, _ = joined()
    assert not link.send("nowhere", b"x")
