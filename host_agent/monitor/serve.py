"""`build_monitor` makes every part of the monitor and connects it to the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IListeningPort

from common.errors import ConfigError
from host_agent.broker.settings import is_loopback
from host_agent.broker.watch import WatchSettings
from host_agent.control_client import Endpoint
from host_agent.metrics import Metrics

from .access import Access, Login
from .brokers import BrokerWatch, Listening
from .hosts import HostFeeds
from .model import Model
from .page import Monitor, QuietSite
from .presence import Presence
from .stream import Stream

IDLE_SECONDS = 120  # of a connection that asks for nothing


@attrs.frozen
class MonitorOptions:
    """What `vmctl monitor` was asked for."""

    interface: str = "127.0.0.1"
    port: int = 8640
    control: bool = False
    login: Login | None = None
    certificate: Path | None = None
    key: Path | None = None
    names: tuple[str, ...] = ()
    brokers: tuple[WatchSettings, ...] = ()

    def check(self) -> None:
        """ConfigError: others could look, or listen in."""
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("--certificate and --key go together", "give both, or neither")
        if not is_loopback(self.interface) and (self.login is None or self.certificate is None):
            raise ConfigError(
                f"{self.interface} can be reached from other machines, so the page needs a login and TLS",
                "--login NAME --password-file FILE --certificate FILE --key FILE",
            )


def build_monitor(reactor: Any, find: Callable[[], list[Endpoint]], options: MonitorOptions) -> MonitorServer:
    """The map of the program. `find` lists the host agents that there are now."""
    options.check()
    model, metrics = Model(), Metrics()
    feeds = HostFeeds(reactor, model, metrics, find)
    hosts = ("localhost", "127.0.0.1", "::1", options.interface, *options.names)
    access = Access(hosts, options.login)
    stream = Stream(reactor, model, {"key": access.key if options.control else "", "control": options.control})
    page = Monitor(feeds, stream, metrics, access, options.control)
    brokers = [BrokerWatch(reactor, settings, model, metrics) for settings in options.brokers]
    listening = Listening(reactor, options.brokers, Presence(model, metrics, lambda: feeds.feeds))
    return MonitorServer(reactor, options, feeds, [*brokers, listening], stream, access, page, model)


@attrs.define
class MonitorServer:
    """The parts' common life."""

    _reactor: Any
    _options: MonitorOptions
    feeds: HostFeeds
    brokers: list[BrokerWatch | Listening]
    stream: Stream
    access: Access
    page: Monitor
    model: Model
    _port: IListeningPort | None = None

    def start(self) -> str:
        """Listen, and follow the host agents; returns the page's address. ConfigError."""
        options, site = self._options, QuietSite(self.page, timeout=IDLE_SECONDS)
        try:
            if options.certificate is None:
                self._port = self._reactor.listenTCP(options.port, site, interface=options.interface)
            else:
                self._port = self._reactor.listenSSL(options.port, site, _tls(options), interface=options.interface)
        except OSError as error:
            raise ConfigError(
                f"the page cannot be served on {options.interface}:{options.port}: {error}", "--listen HOST:PORT"
            ) from None
        self.feeds.start()
        for broker in self.brokers:
            broker.start()
        self.stream.start()
        assert self._port is not None
        address: Any = self._port.getHost()
        shown = f"[{options.interface}]" if ":" in options.interface else options.interface
        scheme = "http" if options.certificate is None else "https"
        token = f"?token={self.access.token}" if options.login is None else ""
        return f"{scheme}://{shown}:{address.port}/{token}"

    def stop(self) -> Deferred[Any]:
        """Listen no more, let every browser go."""
        self.feeds.stop()
        for broker in self.brokers:
            broker.stop()
        self.stream.stop()
        return maybeDeferred(self._port.stopListening) if self._port is not None else maybeDeferred(lambda: None)


def _tls(options: MonitorOptions) -> Any:
    from twisted.internet.ssl import CertificateOptions, PrivateCertificate, TLSVersion

    assert options.certificate is not None and options.key is not None
    try:
        pem = options.key.read_bytes() + b"\n" + options.certificate.read_bytes()
        pair = PrivateCertificate.loadPEM(pem)
        return CertificateOptions(
            privateKey=pair.privateKey.original,
            certificate=pair.original,
            raiseMinimumTo=TLSVersion.TLSv1_2,
        )
    except Exception as error:  # OpenSSL's errors have no common base of their own
        raise ConfigError(f"{options.certificate} and {options.key} cannot be used for TLS: {error!r}") from None
