"""What the host agent asks of its broker, whether it is the embedded one or an external one."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Protocol

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IProtocolFactory

from common import messages
from common.broker_address import BrokerAddress, BrokerEvents, Credentials, Dialect
from host_agent import __version__

from .embedded import EmbeddedBroker
from .limits import BrokerLimits
from .local import LocalLink
from .principals import Principal
from .report import BrokerReport, of_embedded

# One connection carries what goes to all guests: a dead one's queue must never hold it up. The agents send again.
LIMITS = BrokerLimits(message_seconds=60.0, mailbox_prefix="/queue/vmwrapper.guest.")


class HostLink(Protocol):
    """The host agent's own connection to the broker."""

    def start(self) -> None:
        """Begin to connect; returns at once."""

    def send(self, destination: str, body: bytes) -> bool:
        """False: it is lost, and the link between the agents sends it again."""

    def stop(self) -> Deferred[None]: ...


class BrokerAccess(Protocol):
    """The way to the broker, and who logs in to it. A login names its queue."""

    host: str  # this host agent's id: its login and its queue
    dialect: Dialect

    def link(self, subscriptions: Sequence[str], events: BrokerEvents) -> HostLink:
        """Open the broker where it is ours, and make the host agent's connection, not yet started."""

    def connected(self) -> None:
        """The host agent's link is connected."""

    def take_login(self) -> Deferred[Credentials]:
        """A login for a new guest; fails with ConfigError when there is none."""

    def keep_login(self, credentials: Credentials) -> None:
        """The login of a guest that an agent before us started and that is found again."""

    def return_login(self, login: str) -> None:
        """The guest is no more."""

    def guest_brokers(self, gateway: str, port: int) -> tuple[BrokerAddress, ...]:
        """The fail-over list of a guest whose VM serves `service_for` at this address."""

    def service_for(self, login: str) -> IProtocolFactory:
        """Serves the broker to one guest."""

    def report(self) -> BrokerReport:
        """What this host agent knows of the broker by itself."""

    def close(self) -> Deferred[None]: ...


class OwnBroker:
    """The embedded broker: this host agent is in it, and it lets in the guests that the agent expects."""

    dialect = Dialect.STOMP

    def __init__(self, reactor: Any, host: str) -> None:
        self.host = host
        self._reactor = reactor
        self._guests: dict[str, Credentials] = {}
        self._broker = EmbeddedBroker(reactor, authenticate=self.authenticate, limits=LIMITS)

    def link(self, subscriptions: Sequence[str], events: BrokerEvents) -> HostLink:
        return LocalLink(self._reactor, self._broker, subscriptions, events)

    def connected(self) -> None:
        """Nothing to do: guests come through their own ports."""

    def take_login(self) -> Deferred[Credentials]:
        credentials = Credentials(f"g-{secrets.token_hex(8)}", secrets.token_urlsafe(32))
        self.keep_login(credentials)
        return succeed(credentials)

    def keep_login(self, credentials: Credentials) -> None:
        self._guests[credentials.login] = credentials

    def return_login(self, login: str) -> None:
        self._guests.pop(login, None)

    def guest_brokers(self, gateway: str, port: int) -> tuple[BrokerAddress, ...]:
        return (BrokerAddress(gateway, port),)

    def service_for(self, login: str) -> IProtocolFactory:
        return self._broker.factory_for(login)

    def report(self) -> BrokerReport:
        return of_embedded(self._broker.statistics(), LIMITS.stored_bytes, __version__)

    def close(self) -> Deferred[None]:
        return self._broker.stop()

    def authenticate(self, login: str, passcode: str) -> Principal | None:
        expected = self._guests.get(login)
        if expected is None or not secrets.compare_digest(passcode.encode(), expected.passcode.encode()):
            return None
        return Principal.with_rules(
            login,
            send=[messages.host_queue(self.host), messages.PRESENCE],
            subscribe=[messages.guest_queue(login)],
        )
