"""The guests of this host agent: who they are, their links, and whether they are there.

WAITING ──HELLO──▶ PRESENT ──no message for SILENT_AFTER──▶ SILENT ──any message──▶ PRESENT
   └──────────────────┴──────────── BYE, or its VM ended ────────────▶ GONE
"""

from __future__ import annotations

import enum
import hmac
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from common import messages
from common.errors import ProtocolError, VMwrapperError
from common.link import Link, new_session
from common.messages import Bye, Envelope, Hello, Message, Ping, Pong, Welcome

BEACON_EVERY = 10.0  # seconds
SILENT_AFTER = 35.0  # seconds without any message
MOST_PINGS = 64  # that wait for their answer


class Presence(enum.Enum):
    WAITING = "waiting"
    PRESENT = "present"
    SILENT = "silent"
    GONE = "gone"


class GuestListener:
    """Who is told about a guest: `commands.Commands`."""

    def guest_message(self, guest: Guest, message: Message) -> None:
        """A numbered message of the guest."""

    def guest_session(self, guest: Guest, known: Iterable[str]) -> None:
        """The guest is there with a new session and holds the commands `known`."""


@attrs.define(eq=False)
class Guest:
    """One guest and its link. Ids and passcode are made for one VM instance and never used again."""

    id: str
    name: str
    passcode: str = attrs.field(repr=False)
    link: Link = attrs.field(repr=False)
    presence: Presence = Presence.WAITING
    epoch: str = ""
    agent_version: str = ""
    system: str = ""
    home: str = ""
    last_seen: float | None = None  # time.monotonic()
    arrivals: list[Deferred[None]] = attrs.field(factory=list, repr=False)
    pings: dict[str, tuple[float, Deferred[float]]] = attrs.field(factory=dict, repr=False)

    def wait_present(self) -> Deferred[None]:
        """Fires when the guest's agent has said HELLO; at once when it has."""
        waiter: Deferred[None] = Deferred()
        if self.presence is Presence.PRESENT:
            waiter.callback(None)
        else:
            self.arrivals.append(waiter)
        return waiter


class Guests:
    """Takes what guests send to the guest's link, and what is delivered to `listener`."""

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        host: str,
        send: Callable[[str, bytes], None],
        listener: GuestListener,
    ) -> None:
        self._clock = clock
        self._host = host
        self._send = send
        self._listener = listener
        self._guests: dict[str, Guest] = {}
        self._by_session: dict[str, Guest] = {}
        self._watch = LoopingCall(self._look_for_silence)
        self._watch.clock = clock
        self._watch.start(5.0, now=False)

    def __iter__(self) -> Any:
        return iter(self._guests.values())

    def expect(self, guest_id: str, name: str) -> Guest:
        """Make the identity of a guest that is about to be started."""
        queue = messages.guest_queue(guest_id)
        guest: Guest

        def deliver(message: Message) -> None:
            self._deliver(guest, message)

        link = Link(self._clock, new_session(), lambda body: self._send(queue, body), deliver)
        guest = Guest(guest_id, name, secrets.token_urlsafe(32), link)
        self._guests[guest_id] = guest
        return guest

    def get(self, guest_id: str) -> Guest | None:
        return self._guests.get(guest_id)

    def forget(self, guest: Guest, reason: str) -> None:
        """The guest's VM is no more."""
        self._guests.pop(guest.id, None)
        self._by_session = {session: other for session, other in self._by_session.items() if other is not guest}
        guest.presence = Presence.GONE
        guest.link.close()
        failure = VMwrapperError(f"{guest.name}: {reason}")
        for waiter in guest.arrivals:
            waiter.errback(failure)
        guest.arrivals.clear()
        for _, ping in guest.pings.values():
            ping.errback(failure)
        guest.pings.clear()

    def ping(self, guest: Guest) -> Deferred[float]:
        """The time that a PING takes there and back, in seconds."""
        answer: Deferred[float] = Deferred()
        if len(guest.pings) >= MOST_PINGS:
            answer.errback(VMwrapperError(f"{guest.name}: {MOST_PINGS} pings wait for an answer already"))
            return answer
        nonce = secrets.token_hex(8)
        guest.pings[nonce] = (time.monotonic(), answer)
        guest.link.send(Ping(nonce))
        return answer

    # -- the broker

    def broker_connected(self) -> None:
        """What was on its way when the connection broke may be lost: send it again."""
        for guest in self._guests.values():
            if guest.link.peer:
                self._welcome(guest)
                guest.link.resend()

    def received(self, body: bytes) -> None:
        """A body from this host's queue."""
        try:
            envelope = messages.decode(body)
            if envelope.message.SENDER == "host":
                raise ProtocolError(f"{envelope.message.NAME} does not go to hosts")
            if isinstance(envelope.message, Hello):
                self._hello(envelope, envelope.message)
                return
        except ProtocolError as error:
            self._log.warn("refused a message: {error}", error=error)
            return
        guest = self._by_session.get(envelope.sender)
        if guest is None:
            self._log.debug("dropped {t} of an unknown session", t=envelope.message.NAME)
            return
        self._seen(guest)
        guest.link.received(envelope)

    def beacon(self, body: bytes) -> None:
        """A body from the presence topic: other hosts' guests are heard there too."""
        try:
            envelope = messages.decode(body)
        except ProtocolError:
            return
        guest = self._by_session.get(envelope.sender)
        if guest is not None:
            self._seen(guest)

    def _hello(self, envelope: Envelope, hello: Hello) -> None:
        guest = self._guests.get(hello.guest)
        if guest is None:
            raise ProtocolError(f"HELLO of {hello.guest}, which is not one of our guests")
        expected = messages.proof_of(guest.passcode, guest.id, envelope.sender)
        if not hmac.compare_digest(expected, hello.proof):
            raise ProtocolError(f"HELLO for {hello.guest} from somebody who does not know its passcode")
        guest.epoch, guest.agent_version = hello.epoch, hello.agent_version
        guest.system, guest.home = hello.system, hello.home
        if guest.link.peer:
            self._by_session.pop(guest.link.peer, None)
        self._by_session[envelope.sender] = guest
        if guest.link.peer not in ("", envelope.sender):
            # A new session of the guest is a new pair: our numbering starts anew with a session of our own.
            self._log.info("the agent of {name} has started anew", name=guest.name)
        fresh = guest.link.open(envelope.sender)
        self._welcome(guest)
        self._seen(guest)
        if fresh:
            self._listener.guest_session(guest, hello.commands)
        arrivals, guest.arrivals = guest.arrivals, []
        for waiter in arrivals:
            waiter.callback(None)

    def _welcome(self, guest: Guest) -> None:
        guest.link.send(Welcome(self._host, BEACON_EVERY, time.time()))

    def _seen(self, guest: Guest) -> None:
        guest.last_seen = time.monotonic()
        if guest.presence is not Presence.PRESENT:
            self._log.info("the agent of {name} is present", name=guest.name)
            guest.presence = Presence.PRESENT

    def _look_for_silence(self) -> None:
        now = time.monotonic()
        for guest in self._guests.values():
            if guest.presence is Presence.PRESENT and now - (guest.last_seen or now) > SILENT_AFTER:
                self._log.warn("the agent of {name} has been silent for {s:.0f} s", name=guest.name, s=SILENT_AFTER)
                guest.presence = Presence.SILENT

    # -- messages of an open session

    def _deliver(self, guest: Guest, message: Message) -> None:
        if isinstance(message, Pong):
            waiting = guest.pings.pop(message.nonce, None)
            if waiting is not None:
                waiting[1].callback(time.monotonic() - waiting[0])
        elif isinstance(message, Bye):
            self._log.info("the agent of {name} says goodbye: {reason}", name=guest.name, reason=message.reason)
            guest.presence = Presence.GONE
        elif message.NUMBERED:
            self._listener.guest_message(guest, message)

    def stop(self) -> None:
        if self._watch.running:
            self._watch.stop()
        for guest in list(self._guests.values()):
            self.forget(guest, "the host agent ends")
