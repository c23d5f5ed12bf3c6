"""An external broker: its logins, and the way to it for guests that reach nothing but their own ports."""

from __future__ import annotations

import enum
import os
from collections import deque
from collections.abc import Sequence
from typing import Any, BinaryIO

import attrs
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IProtocolFactory
from twisted.logger import Logger

from common import messages
from common.broker_address import BrokerAddress, BrokerEvents, Credentials
from common.broker_link import BrokerLink
from common.errors import ConfigError

from .forward import Forwarder
from .report import BrokerReport
from .settings import BrokerSettings

DRAINS_AT_ONCE = 16  # queues that are emptied; with a thousand at a time a broker answers none in time
DRAIN_AGAIN = 1.0  # seconds
LOGIN_SECONDS = 30.0  # for a login to become free, or for the broker to be reached


class LoginState(enum.Enum):
    """FREE ──take──▶ USED ──return──▶ DRAINING ──its queue is empty──▶ FREE"""

    FREE = "free"
    USED = "used"
    DRAINING = "draining"  # what its queue holds was meant for the guest before


class ExternalBroker:
    """Brokers that somebody else runs, as a settings file describes them.

    A guest's broker port is forwarded, byte for byte, to the broker that this host agent itself is connected to:
    the brokers of the list need not know each other, so both ends have to meet on one. TLS passes through end to
    end, and the guest checks the broker's certificate itself.
    """

    _log = Logger()

    def __init__(self, reactor: Any, settings: BrokerSettings) -> None:
        self.host = settings.host.login
        self.dialect = settings.dialect
        self._settings = settings
        # An agent that was killed may have left messages in any of the queues.
        self._states = dict.fromkeys(settings.guests, LoginState.DRAINING)
        self._to_drain: deque[str] = deque()
        self._draining: set[str] = set()
        self._waiters: list[Deferred[Credentials]] = []
        self._reactor = reactor
        self._forwarder = Forwarder(reactor)
        self._link: BrokerLink | None = None
        self._lock: BinaryIO | None = None

    def link(self, subscriptions: Sequence[str], events: BrokerEvents) -> BrokerLink:
        """Claims the settings: two host agents with one login would take each other's messages."""
        self._lock = lock_settings(self._settings)
        link = BrokerLink(
            self._reactor, self._settings.brokers, self._settings.host, subscriptions, events, self.dialect
        )
        self.use(link)
        return link

    def use(self, link: BrokerLink) -> None:
        """The host agent's link, which also empties the queues of guests that are gone."""
        self._link = link

    def connected(self) -> None:
        link = self._link
        assert link is not None
        if link.address is not None:
            self._forwarder.lead_to(link.address.host, link.address.port)
        dirty = (login for login, state in self._states.items() if state is LoginState.DRAINING)
        self._to_drain = deque(login for login in dirty if login not in self._draining)
        self._drain_next()

    def take_login(self) -> Deferred[Credentials]:
        free = [login for login, state in self._states.items() if state is LoginState.FREE]
        if free:
            self._states[free[0]] = LoginState.USED
            return succeed(self._credentials(free[0]))
        if LoginState.DRAINING not in self._states.values():
            return fail(
                ConfigError(
                    f"all {len(self._states)} guest logins of {self._settings.file} are in use",
                    "end a VM, or make more logins with vmctl broker init --guests N",
                )
            )
        waiter: Deferred[Credentials] = Deferred(self._waiters.remove)
        self._waiters.append(waiter)
        return waiter.addTimeout(LOGIN_SECONDS, self._reactor, self._no_login)

    def _no_login(self, result: object, seconds: float) -> Credentials:
        why = "the broker is not connected" if self._link is None or not self._link.connected else "none became free"
        raise ConfigError(f"no guest login of {self._settings.file} could be had within {seconds:.0f} s: {why}")

    def keep_login(self, credentials: Credentials) -> None:
        if credentials.login in self._states:
            self._states[credentials.login] = LoginState.USED
        else:
            self._log.warn(
                "{file} has no guest login {login} any more", file=self._settings.file, login=credentials.login
            )

    def return_login(self, login: str) -> None:
        if self._states.get(login) is LoginState.USED:
            self._states[login] = LoginState.DRAINING
            self._to_drain.append(login)
            self._drain_next()

    def _credentials(self, login: str) -> Credentials:
        return Credentials(login, self._settings.guests[login])

    def _drain_next(self) -> None:
        """The next guest must not read what was sent to this one. Without a connection it waits for the next."""
        while self._link is not None and self._to_drain and len(self._draining) < DRAINS_AT_ONCE:
            if not self._link.connected:
                return
            login = self._to_drain.popleft()
            self._draining.add(login)
            self._link.drain(messages.guest_queue(login)).addCallback(self._drained, login)

    def _drained(self, empty: bool, login: str) -> None:
        self._draining.discard(login)
        if self._states[login] is LoginState.DRAINING and not empty:
            self._log.debug("the queue of {login} could not be emptied yet", login=login)
            self._to_drain.append(login)
            self._reactor.callLater(DRAIN_AGAIN, self._drain_next)
            return
        if self._states[login] is LoginState.DRAINING:
            self._states[login] = LoginState.FREE
            if self._waiters:
                self._states[login] = LoginState.USED
                self._waiters.pop(0).callback(self._credentials(login))
        self._drain_next()

    def guest_brokers(self, gateway: str, port: int) -> tuple[BrokerAddress, ...]:
        """One place, under each name that a broker of the list may show."""
        checks = []
        for broker in self._settings.brokers:
            tls = broker.tls
            if tls is not None and not tls.server_name:
                tls = attrs.evolve(tls, server_name=broker.host)
            if tls not in checks:
                checks.append(tls)
        return tuple(BrokerAddress(gateway, port, tls) for tls in checks)

    def service_for(self, login: str) -> IProtocolFactory:
        return self._forwarder.factory()

    def report(self) -> BrokerReport:
        """Only whether it is reached: an agent's login may not ask for more (`vmctl monitor --broker` does)."""
        link = self._link
        connected = link is not None and link.connected
        address = link.address if link is not None and link.address is not None else self._settings.brokers[0]
        return BrokerReport(
            kind=self._settings.kind,
            name=str(address),
            problem=""
            if connected
            else f"{self.host} has no connection to it: vmctl broker check {self._settings.file}",
        )

    def close(self) -> Deferred[None]:
        self._forwarder.cut()
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        return succeed(None)


def lock_settings(settings: BrokerSettings) -> BinaryIO:
    """The settings file, locked for as long as it is open; ConfigError when a host agent has it."""
    opened = settings.file.open("rb")
    if os.name == "posix":
        import fcntl

        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            opened.close()
            raise ConfigError(
                f"another host agent uses the broker settings {settings.file} and so is {settings.host.login}",
                "give each host agent logins of its own: vmctl broker init --host-id OTHER",
            ) from None
    return opened
