"""Does a broker do what its settings file promises? Logs in with every login and tries what it may and must not.

What must be refused is tried with a mark of our own as the body, and counts as refused only when nothing of it
arrived where it must not: brokers differ in what they answer.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator

import attrs

from common import messages
from common.broker_address import BrokerAddress, Credentials, Dialect
from common.stomp_connection import StompConnection

from .settings import BrokerSettings

SECONDS = 10.0
SILENCE = 1.0  # seconds in which nothing may arrive
MOST_GUESTS = 3  # whose rights are tried; the logins of all are


@attrs.frozen
class Finding:
    """One thing that was looked at."""

    good: bool
    sentence: str


class Client:
    """A blocking client for a few messages, speaking as our agents do."""

    def __init__(self, address: BrokerAddress, credentials: Credentials, dialect: Dialect) -> None:
        self._dialect = dialect
        self._login = credentials.login
        self._arrived = threading.Condition()
        self._bodies: list[bytes] = []
        self._connection = StompConnection(address, credentials, self._receive, self._lost)

    def open(self) -> str:
        """Returns "" or why it could not."""
        return self._connection.open(threading.Event())

    def _receive(self, connection: StompConnection, number: int, body: bytes) -> None:
        with self._arrived:
            self._bodies.append(body)
            self._arrived.notify_all()

    def _lost(self) -> None:
        with self._arrived:
            self._arrived.notify_all()

    def subscribe(self, destination: str, number: int = 1) -> None:
        self._try(lambda: self._connection.subscribe(self._dialect.to_subscribe(destination, self._login), number))

    def send(self, destination: str, body: bytes) -> None:
        self._try(lambda: self._connection.send(self._dialect.to_send(destination), body))

    def _try(self, what: object) -> None:
        assert callable(what)
        try:
            what()
        except Exception:
            self._connection.fail("broke the connection")

    def hears(self, body: bytes, seconds: float = SECONDS) -> bool:
        """Whether this body arrives in time. The end of the connection ends the wait."""
        deadline = time.monotonic() + seconds
        with self._arrived:
            while body not in self._bodies:
                left = deadline - time.monotonic()
                if left <= 0 or self._connection.lost.is_set():
                    return body in self._bodies
                self._arrived.wait(left)
        return True

    @property
    def heard(self) -> list[bytes]:
        """Everything so far."""
        with self._arrived:
            return list(self._bodies)

    @property
    def reason(self) -> str:
        return self._connection.reason

    def close(self) -> None:
        self._connection.close()


def check_broker(settings: BrokerSettings) -> Iterator[Finding]:
    """Everything that is right or wrong, as it is found."""
    for address in settings.brokers:
        yield from _Check(settings, address).run()


def _mark() -> bytes:
    return f"check {secrets.token_hex(8)}".encode()


@attrs.define
class _Check:
    settings: BrokerSettings
    address: BrokerAddress
    _clients: list[Client] = attrs.field(factory=list)

    def run(self) -> Iterator[Finding]:
        try:
            yield from self._look()
        finally:
            for client in self._clients:
                client.close()

    def _open(self, login: str, passcode: str) -> Client | str:
        client = Client(self.address, Credentials(login, passcode), self.settings.dialect)
        reason = client.open()
        if reason:
            client.close()
            return reason
        self._clients.append(client)
        return client

    def _look(self) -> Iterator[Finding]:
        settings, place = self.settings, self.address
        name = settings.host.login
        host = self._open(name, settings.host.passcode)
        if isinstance(host, str):
            yield Finding(False, f"the broker at {place} {host}")
            return
        how = "with TLS, its certificate is right" if place.tls else "without TLS"
        yield Finding(True, f"the broker at {place} answers {how}, and knows the host {name}")
        wrong = self._open(name, secrets.token_urlsafe(16))
        yield Finding(isinstance(wrong, str), f"a wrong passcode is {'refused' if isinstance(wrong, str) else 'TAKEN'}")
        guests: dict[str, Client] = {}
        for login, passcode in settings.guests.items():
            guest = self._open(login, passcode)
            if isinstance(guest, str):
                yield Finding(False, f"the guest login {login}: the broker {guest}")
                continue
            guests[login] = guest
            if len(guests) > MOST_GUESTS:
                guests.pop(login).close()
        yield Finding(bool(guests), f"{len(settings.guests)} guest logins were tried")
        host.subscribe(messages.host_queue(name), 1)
        host.subscribe(messages.PRESENCE, 2)
        for login, guest in guests.items():
            yield from self._may(host, login, guest)
        for login in guests:
            yield from self._must_not(host, login)

    def _may(self, host: Client, login: str, guest: Client) -> Iterator[Finding]:
        mark = _mark()
        guest.subscribe(messages.guest_queue(login))
        host.send(messages.guest_queue(login), mark)
        yield _finding(guest.hears(mark), f"{login} hears its host", guest.reason or host.reason)
        for destination in (messages.host_queue(self.settings.host.login), messages.PRESENCE):
            mark = _mark()
            guest.send(destination, mark)
            yield _finding(host.hears(mark), f"{login} is heard on {destination}", guest.reason or host.reason)

    def _must_not(self, host: Client, login: str) -> Iterator[Finding]:
        own = messages.host_queue(self.settings.host.login)
        other = next((name for name in self.settings.guests if name != login), "")
        if other:
            foreign = messages.guest_queue(other)
            yield self._reads(host, login, foreign)
            yield self._writes(login, other)
        yield self._reads(host, login, own, through=login)

    def _reads(self, host: Client, login: str, destination: str, through: str = "") -> Finding:
        """A guest subscribes to what is not its own; then somebody who may writes there."""
        intruder = self._open(login, self.settings.guests[login])
        if isinstance(intruder, str):
            return Finding(False, f"{login} could not log in again: the broker {intruder}")
        intruder.subscribe(destination)
        marks = [_mark() for _ in range(4)]  # readers of one queue take turns
        sender = self._open(through, self.settings.guests[through]) if through else host
        if isinstance(sender, str):
            return Finding(False, f"{through} could not log in again: the broker {sender}")
        for mark in marks:
            sender.send(destination, mark)
        heard = any(intruder.hears(mark, SILENCE / len(marks)) for mark in marks)
        intruder.close()
        return Finding(not heard, f"{login} {'READS' if heard else 'cannot read'} {destination}")

    def _writes(self, login: str, other: str) -> Finding:
        intruder = self._open(login, self.settings.guests[login])
        victim = self._open(other, self.settings.guests[other])
        if isinstance(intruder, str) or isinstance(victim, str):
            return Finding(False, f"{login} or {other} could not log in again")
        destination, marks = messages.guest_queue(other), [_mark() for _ in range(4)]
        victim.subscribe(destination)
        for mark in marks:
            intruder.send(destination, mark)
        heard = any(victim.hears(mark, SILENCE / len(marks)) for mark in marks)
        intruder.close()
        victim.close()
        return Finding(not heard, f"{login} {'WRITES' if heard else 'cannot write'} to {destination}")


def _finding(good: bool, sentence: str, reason: str) -> Finding:
    return Finding(good, sentence if good else f"NOT so: {sentence}" + (f"; the broker {reason}" if reason else ""))
