"""`vmwrapper-host-agent --metrics HOST:PORT`: this host agent's metrics, for Prometheus to scrape."""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import IListeningPort
from twisted.web.resource import Resource
from twisted.web.server import Site

from common.errors import ConfigError

from .broker.settings import is_loopback
from .metrics import CONTENT_TYPE, Metrics
from .observe import Observation

MOST_REQUEST = 16 * 1024  # bytes


def split_address(text: str) -> tuple[str, int]:
    """HOST:PORT, or PORT of the loopback. ConfigError."""
    host, _, port = text.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise ConfigError(f"{text!r} is not HOST:PORT", "for example 127.0.0.1:9640; port 0 takes a free one")
    return host, int(port)


class MetricsPage(Resource):
    """GET /metrics."""

    isLeaf = True

    def __init__(self, host: str, metrics: Metrics, observation: Observation) -> None:
        super().__init__()
        self._host = host
        self._metrics = metrics
        self._observation = observation

    def render_GET(self, request: Any) -> bytes:
        request.setHeader("Content-Type", CONTENT_TYPE)
        self._metrics.host_up(self._host, True)
        self._metrics.vms(self._host, self._observation.all_vms())
        self._metrics.broker(self._host, self._observation.broker_report().to_json())
        return self._metrics.text()


def serve_metrics(reactor: Any, address: str, host: str, observation: Observation) -> IListeningPort:
    """Listen. There is no login, so only the loopback may be listened on. ConfigError."""
    interface, port = split_address(address)
    if not is_loopback(interface):
        raise ConfigError(
            f"{interface} can be reached from other machines, and the host agent's metrics have no login",
            "let vmctl monitor serve them, which has a login and TLS",
        )
    metrics = Metrics()
    observation.listen(lambda event: metrics.event(host, event))
    root = Resource()
    root.putChild(b"metrics", MetricsPage(host, metrics, observation))
    site = Site(root)
    site.noisy = False
    try:
        listening: IListeningPort = reactor.listenTCP(port, site, interface=interface)
    except OSError as error:
        raise ConfigError(f"metrics cannot be served on {address}: {error}") from None
    return listening
