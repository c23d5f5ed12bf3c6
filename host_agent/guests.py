"""The guests of this host agent: who they are, their links, and whether they are there.

WAITING ──HELLO──▶ PRESENT ──no message for SILENT_AFTER──▶ SILENT ──any message──▶ PRESENT
   └──────────────────┴──────────── BYE, or its VM ended ────────────▶ GONE
"""

from __future__ import annotations

import enum
import hmac
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from common import messages
from common.broker_address import Credentials
from common.errors import ProtocolError, VMwrapperError
from common.link import Link, new_session
from common.messages import Beacon, Bye, Envelope, Hello, Message, Ping, Pong, Welcome

from .events import Happened

BEACON_EVERY = 10.0  # seconds
LOOK_EVERY = 5.0  # seconds
SILENT_AFTER = 35.0  # seconds without any message
MOST_PINGS = 64  # that wait for their answer


class Presence(enum.Enum):
    WAITING = "waiting"
    PRESENT = "present"
    SILENT = "silent"
    GONE = "gone"


class ForeignAgent(VMwrapperError):
    """The agent in a guest is of another version, one that we do not understand."""

    code = "foreign_agent"  # as in `docs/control.md`

    def __init__(self, name: str, version: str, error: ProtocolError) -> None:
        which = f"agent {version}" if version else "agent"
        super().__init__(
            f"The {which} in the image of the VM {name} is of another version than this host agent: {error}.",
            "build or fetch the image anew: vmctl image build",
        )


class GuestListener:
    """Who is told about a guest: `requests.Requests`."""

    def guest_message(self, guest: Guest, message: Message) -> None:
        """A numbered message of the guest."""

    def guest_session(self, guest: Guest, held: Mapping[str, str]) -> None:
        """The guest is there with a new session; `held` is what HELLO says of the commands that it holds."""


@attrs.frozen
class Identity:
    """Who a guest is. `guest` and `secret`, which proves its HELLO, are made for one VM instance and never used again.

    `credentials` open the broker for it, and their login names its queue; an external broker's may be another guest's
    later.
    """

    guest: str
    credentials: Credentials
    secret: str = attrs.field(repr=False)

    @classmethod
    def new(cls, credentials: Credentials) -> Identity:
        return cls(f"g-{secrets.token_hex(8)}", credentials, secrets.token_urlsafe(32))

    @property
    def login(self) -> str:
        return self.credentials.login


@attrs.define(eq=False)
class Guest:
    """One guest and its link."""

    identity: Identity
    name: str
    link: Link = attrs.field(repr=False)
    presence: Presence = Presence.WAITING
    epoch: int = 1  # counts its boots and restores
    boot: str = ""  # as its HELLO says; "": not known
    session: str = ""  # its end of the link
    agent_version: str = ""
    system: str = ""
    home: str = ""
    last_seen: float | None = None  # time.monotonic()
    beacon: Beacon | None = None  # the last
    arrivals: list[Deferred[None]] = attrs.field(factory=list, repr=False)
    pings: dict[str, tuple[float, Deferred[float]]] = attrs.field(factory=dict, repr=False)
    _stood_s: float = 0.0  # while its VM was paused
    _paused_at: float | None = None

    @property
    def id(self) -> str:
        return self.identity.guest

    def paused(self, now: float) -> None:
        """Its VM stands still: nobody expects a word from it."""
        if self._paused_at is None:
            self._paused_at = now

    def resumed(self, now: float) -> None:
        """Its VM runs again."""
        if self._paused_at is not None:
            self._stood_s += now - self._paused_at
            self._paused_at = None
            self.last_seen = time.monotonic()

    def silent_for(self) -> float:
        """Seconds since its last word."""
        return 0.0 if self.last_seen is None else time.monotonic() - self.last_seen

    @property
    def is_paused(self) -> bool:
        return self._paused_at is not None

    def stood_still(self, now: float) -> float:
        """Seconds in which its VM was paused, until now."""
        return self._stood_s + (0.0 if self._paused_at is None else now - self._paused_at)

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
        new_epoch: Callable[[Guest], None] = lambda guest: None,
    ) -> None:
        """`new_epoch` is told of each epoch before the guest is: a host agent that is killed must know it again."""
        self._new_epoch = new_epoch
        self._clock = clock
        self._host = host
        self._send = send
        self._listener = listener
        self._guests: dict[str, Guest] = {}
        self._by_session: dict[str, Guest] = {}
        self._watch = LoopingCall(self._look_for_silence)
        self._watch.clock = clock
        self._watch.start(LOOK_EVERY, now=False)
        self._deaf = True  # without a broker
        self._looked = time.monotonic()

    def __iter__(self) -> Any:
        return iter(self._guests.values())

    def expect(self, identity: Identity, name: str, epoch: int = 1, boot: str = "") -> Guest:
        """A guest that is about to be started, or that an earlier host agent has left to us."""
        queue = messages.guest_queue(identity.login)
        guest: Guest

        def deliver(message: Message) -> None:
            self._deliver(guest, message)

        link = Link(self._clock, new_session(), lambda body: self._send(queue, body), deliver)
        guest = Guest(identity, name, link, epoch=epoch, boot=boot)
        self._guests[guest.id] = guest
        return guest

    def restored(self, guest: Guest) -> None:
        """The guest is going back to an older snapshot: what it says from now on counts only in a new epoch."""
        self._begin_epoch(guest, boot="")

    def _begin_epoch(self, guest: Guest, boot: str) -> None:
        guest.epoch += 1
        guest.boot = boot
        self._new_epoch(guest)
        self._by_session.pop(guest.session, None)
        guest.session = ""
        guest.link.renew(new_session())
        self._welcome(guest, "", opened=False)  # in case it is connected, and knows nothing of this

    def get(self, guest_id: str) -> Guest | None:
        return self._guests.get(guest_id)

    def forget(self, guest: Guest, reason: str) -> None:
        """The guest's VM is no more."""
        self._guests.pop(guest.id, None)
        self._by_session.pop(guest.session, None)
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
        self._deaf = False
        for guest in self._guests.values():
            if guest.link.peer:
                self._welcome(guest, guest.session)
                guest.link.resend()
            else:
                # A guest that an earlier host agent left us may be connected to its broker all the time.
                self._welcome(guest, "", opened=False)

    def broker_lost(self) -> None:
        """Nobody can be heard: until it is back, no guest is silent by its own fault."""
        self._deaf = True

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
            self._log.warn("refused a message: {error}", event=Happened.REFUSED, error=error, reason=str(error))
            self._look_at_refused(messages.claims(body), error)
            return
        guest = self._by_session.get(envelope.sender)
        if guest is None:
            self._log.debug("dropped {t} of an unknown session", t=envelope.message.NAME)
            return
        self._seen(guest)
        guest.link.received(envelope)

    def _look_at_refused(self, claims: Mapping[str, str], error: ProtocolError) -> None:
        """A guest that is awaited and cannot be understood will not be understood later either."""
        guest = self._guests.get(claims.get("guest", ""))
        if guest is None or guest.presence is not Presence.WAITING:
            return
        arrivals, guest.arrivals = guest.arrivals, []
        for waiter in arrivals:
            waiter.errback(ForeignAgent(guest.name, claims.get("agent_version", ""), error))

    def beacon(self, body: bytes) -> None:
        """A body from the presence topic: other hosts' guests are heard there too."""
        try:
            envelope = messages.decode(body)
        except ProtocolError as error:
            self._log.warn("refused a beacon: {error}", event=Happened.REFUSED, error=error, reason=str(error))
            return
        guest = self._by_session.get(envelope.sender)
        if guest is not None:
            if isinstance(envelope.message, Beacon):
                guest.beacon = envelope.message
            self._seen(guest)

    def _hello(self, envelope: Envelope, hello: Hello) -> None:
        guest = self._guests.get(hello.guest)
        if guest is None:
            raise ProtocolError(f"HELLO of {hello.guest}, which is not one of our guests")
        expected = messages.proof_of(guest.identity.secret, guest.id, envelope.sender)
        if not hmac.compare_digest(expected, hello.proof):
            raise ProtocolError(f"HELLO for {hello.guest} from somebody who does not know its secret")
        if not guest.boot:
            guest.boot = hello.boot
            self._new_epoch(guest)
        elif guest.boot != hello.boot:
            self._log.info("{name} has booted anew", name=guest.name)
            self._begin_epoch(guest, hello.boot)
        if hello.epoch != guest.epoch:
            # Its view may be of another time. It will take our epoch over and say HELLO again.
            self._welcome(guest, envelope.sender, opened=False)
            return
        guest.agent_version, guest.system, guest.home = hello.agent_version, hello.system, hello.home
        if guest.session != envelope.sender:
            self._by_session.pop(guest.session, None)
            guest.session = envelope.sender
            self._by_session[guest.session] = guest
        self._welcome(guest, guest.session)  # first: before it, the guest listens to nothing that is sent again
        fresh = guest.link.open(guest.session)
        self._seen(guest)
        if fresh:
            self._log.info(
                "{vm}: session {session} in epoch {epoch}",
                event=Happened.GUEST_SESSION,
                vm=guest.name,
                instance=guest.id,
                session=guest.session,
                epoch=guest.epoch,
            )
            self._listener.guest_session(guest, hello.commands)
        arrivals, guest.arrivals = guest.arrivals, []
        for waiter in arrivals:
            waiter.callback(None)

    def _welcome(self, guest: Guest, session: str, *, opened: bool = True) -> None:
        welcome = Welcome(self._host, opened, guest.epoch, BEACON_EVERY, time.time())
        self._send(
            messages.guest_queue(guest.identity.login), messages.encode(Envelope(welcome, guest.link.session, session))
        )

    def _seen(self, guest: Guest) -> None:
        guest.last_seen = time.monotonic()
        if guest.presence is not Presence.PRESENT:
            guest.presence = Presence.PRESENT
            self._log.info("the agent of {vm} is present", **_about(guest))

    def _look_for_silence(self) -> None:
        now = time.monotonic()
        slept, self._looked = now - self._looked > 4 * LOOK_EVERY, now
        if self._deaf or slept:  # it is we who could not hear
            for guest in self._guests.values():
                guest.last_seen = None if guest.last_seen is None else now
            return
        for guest in self._guests.values():
            silent = not guest.is_paused and now - (guest.last_seen or now) > SILENT_AFTER
            if guest.presence is Presence.PRESENT and silent:
                guest.presence = Presence.SILENT
                self._log.warn("the agent of {vm} has been silent for {s:.0f} s", s=SILENT_AFTER, **_about(guest))

    # -- messages of an open session

    def _deliver(self, guest: Guest, message: Message) -> None:
        if isinstance(message, Pong):
            waiting = guest.pings.pop(message.nonce, None)
            if waiting is not None:
                waiting[1].callback(time.monotonic() - waiting[0])
        elif isinstance(message, Bye):
            guest.presence = Presence.GONE
            self._log.info("the agent of {vm} says goodbye: {reason}", reason=message.reason, **_about(guest))
        elif message.NUMBERED:
            self._listener.guest_message(guest, message)

    def stop(self) -> None:
        if self._watch.running:
            self._watch.stop()
        for guest in list(self._guests.values()):
            self.forget(guest, "the host agent ends")


def _about(guest: Guest) -> dict[str, Any]:
    """What the log says of a guest whose presence has changed."""
    return {
        "event": Happened.GUEST_PRESENCE,
        "vm": guest.name,
        "instance": guest.id,
        "presence": guest.presence.value,
    }
