"""Where brokers are and how one is entered: values alone. Who only hands them on need not load what connects."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Protocol

import attrs

from .errors import ConfigError

if TYPE_CHECKING:
    import ssl


@attrs.frozen
class Tls:
    """How a broker's certificate is checked.

    `ca`: the accepted authorities' certificates as PEM text, "" for those of the operating system.
    `server_name`: the name that the certificate must carry, "" for the host that is connected to.
    """

    ca: str = attrs.field(default="", repr=False)
    server_name: str = ""

    def context(self) -> ssl.SSLContext:
        """Made anew for each connection: it is cheap beside the handshake. ConfigError when the PEM is none."""
        import ssl

        try:
            context = ssl.create_default_context(cadata=self.ca or None)
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(f"the certificate authority for the broker is not a PEM certificate: {error}") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context


@attrs.frozen
class BrokerAddress:
    """One broker of a fail-over list; without `tls` the connection is not encrypted."""

    host: str
    port: int
    tls: Tls | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@attrs.frozen
class Credentials:
    """What a broker asks for. The passcode never shows in logs."""

    login: str
    passcode: str = attrs.field(repr=False)


class Dialect(enum.Enum):
    """How a broker names our destinations (`docs/broker.md` says why they differ)."""

    STOMP = "stomp"  # as they are: the embedded broker, ActiveMQ
    RABBITMQ = "rabbitmq"  # an exchange to send to and a queue to read, both declared beforehand

    def to_send(self, destination: str) -> str:
        if self is Dialect.STOMP:
            return destination
        return f"/exchange/{destination.split('/', 2)[2]}"

    def to_subscribe(self, destination: str, login: str) -> str:
        if self is Dialect.STOMP:
            return destination
        _, kind, name = destination.split("/", 2)
        # Each reader of a topic has a queue of its own, bound to the topic's exchange.
        return f"/amq/queue/{name}.{login}" if kind == "topic" else f"/amq/queue/{name}"


class BrokerEvents(Protocol):
    """Who is told what happens on a connection; all calls are made in the reactor's thread."""

    def broker_connected(self) -> None: ...

    def broker_disconnected(self, reason: str) -> None: ...

    def broker_message(self, destination: str, body: bytes) -> None: ...
