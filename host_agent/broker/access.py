"""What the host agent asks of its broker, whether it is the embedded one or an external one."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Protocol

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IListeningPort, IProtocolFactory

from common import messages
from common.broker_link import BrokerAddress, BrokerLink, Credentials, Dialect

from .embedded import EmbeddedBroker
from .limits import BrokerLimits
from .principals import Principal

LOOPBACK = "127.0.0.1"
# One connection carries what goes to all guests: a dead one's queue must never hold it up. The agents send again.
LIMITS = BrokerLimits(message_seconds=60.0, mailbox_prefix="/queue/vmwrapper.guest.")


class BrokerAccess(Protocol):
    """Where the broker is, and who logs in to it. A login names its queue."""

    host: str  # this host agent's id: its login and its queue
    credentials: Credentials  # with which the host agent logs in
    dialect: Dialect

    def open(self) -> Deferred[Sequence[BrokerAddress]]:
        """Fires with the host agent's fail-over list."""

    def connected(self, link: BrokerLink) -> None:
        """The host agent's link is connected, to `link.address`."""

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

    def close(self) -> Deferred[None]: ...


class OwnBroker:
    """The embedded broker: it lets in this host agent and the guests that it expects."""

    dialect = Dialect.STOMP

    def __init__(self, reactor: Any, host: str) -> None:
        self.host = host
        self.credentials = Credentials(self.host, secrets.token_urlsafe(32))
        self._guests: dict[str, Credentials] = {}
        self._broker = EmbeddedBroker(reactor, authenticate=self.authenticate, limits=LIMITS)

    def open(self) -> Deferred[Sequence[BrokerAddress]]:
        def listening(port: IListeningPort) -> Sequence[BrokerAddress]:
            place: Any = port.getHost()
            return [BrokerAddress(LOOPBACK, place.port)]

        return self._broker.listen(LOOPBACK, 0).addCallback(listening)

    def connected(self, link: BrokerLink) -> None:
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

    def close(self) -> Deferred[None]:
        return self._broker.stop()

    def authenticate(self, login: str, passcode: str) -> Principal | None:
        own = login == self.host
        expected = self.credentials if own else self._guests.get(login)
        if expected is None or not secrets.compare_digest(passcode.encode(), expected.passcode.encode()):
            return None
        if own:
            return Principal.with_rules(login, send=["/queue/vmwrapper.guest.*"], subscribe=["*"])
        return Principal.with_rules(
            login,
            send=[messages.host_queue(self.host), messages.PRESENCE],
            subscribe=[messages.guest_queue(login)],
        )
