"""The embedded broker beside ActiveMQ and RabbitMQ: requests, large bodies, memory for idle clients, a flood.

Both ends of everything are bare sockets in this process, the same for each broker. A request of 200 bytes goes to a
queue, its reply comes back on another; both are acknowledged one by one, and 64 are in flight. Bodies of 1 MiB go one
way, eight in flight. Each broker is a process of its own, and they are measured in turn; the external ones are set up
as `vmctl broker init` does it. The limit is the same exchange through a process that only copies bytes from one socket
to the other: what no broker can pass on this machine. `cpu_us_per_request` is CPU time of the broker's processes;
`cpu_ratio_to_clients` compares it with that of the two bare sockets, which changes less than that of the limit.

The short form leaves the external brokers and the idle clients out.
"""

from __future__ import annotations

import contextlib
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Protocol

from benchmarks import SHORT
from benchmarks.bare_stomp import connect, embedded_broker, server
from benchmarks.broker_load import (
    beside_idle_clients,
    large_mb_per_second,
    latency_beside_a_flood,
    pair,
    requests_per_second,
    sender_and_receiver,
    single_requests,
)
from benchmarks.cpu import cpu_seconds
from benchmarks.peers.packages import Unavailable, need
from benchmarks.report import OURS, rounds_of, show
from tests.brokers import RunningBroker

REQUESTS = 5_000 if SHORT else 20_000
ROUNDS = 3 if SHORT else 5
LARGE_COUNT = 32 if SHORT else 128
SINGLE = 500 if SHORT else 1_000
IDLE_CLIENTS = 1_000
EXTERNAL = {"activemq": "ActiveMQ", "rabbitmq": "RabbitMQ"}
PACKAGES = {"activemq": "activemq", "rabbitmq": "rabbitmq-server"}
LIMIT = "limit: bare sockets"
# Not those of the tests, which start quickly and run slowly.
JAVA_OPTIONS = "-Xms64M -Xmx512M"

_RELAY = """
import selectors, socket
listening = socket.create_server(("127.0.0.1", 0))
print("listening on 127.0.0.1:%d" % listening.getsockname()[1], flush=True)
ends = [listening.accept()[0], listening.accept()[0]]
chosen = selectors.DefaultSelector()
for end, other in (ends, ends[::-1]):
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    chosen.register(end, selectors.EVENT_READ, other)
while True:
    for key, _ in chosen.select():
        data = key.fileobj.recv(262144)
        if not data:
            raise SystemExit
        key.data.sendall(data)
"""


class Broker(Protocol):
    """What is measured: `Server` and `RunningBroker` have these."""

    @property
    def port(self) -> int: ...
    @property
    def pids(self) -> list[int]: ...
    @property
    def memory_bytes(self) -> int: ...


class Found:
    """Values by broker, of each kind of measurement."""

    def __init__(self) -> None:
        self.rates: dict[str, list[float]] = {}
        self.cpu_us: dict[str, list[float]] = {}
        self.clients_us: dict[str, list[float]] = {}
        self.large: dict[str, list[float]] = {}
        self.single: dict[str, list[float]] = {}
        self.idle_mb: dict[str, float] = {}
        self.idle_kb_each: dict[str, float] = {}

    def add(self, name: str, rate: Callable[[], float], pids: list[int]) -> None:
        before, own_before = cpu_seconds(pids), time.process_time()
        self.rates.setdefault(name, []).append(rate())
        self.cpu_us.setdefault(name, []).append((cpu_seconds(pids) - before) / REQUESTS * 1e6)
        self.clients_us.setdefault(name, []).append((time.process_time() - own_before) / REQUESTS * 1e6)


def run() -> dict[str, float]:
    """Measure everything; about three minutes."""
    _raise_file_limit()
    found, missing = Found(), {}
    with tempfile.TemporaryDirectory(prefix="vmwrapper-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        brokers: dict[str, Broker] = {OURS: stack.enter_context(embedded_broker(folder))}
        for kind, called in () if SHORT else EXTERNAL.items():
            try:
                need(PACKAGES[kind])
                external = RunningBroker.make(kind, folder, java_options=JAVA_OPTIONS)
                brokers[called] = stack.enter_context(external)
            except Unavailable as reason:
                missing[called] = str(reason)
        if not SHORT:
            for called, broker in brokers.items():  # before any load: memory that it leaves behind is not theirs
                before = broker.memory_bytes
                found.idle_mb[called] = beside_idle_clients(broker.port, IDLE_CLIENTS, _memory_mb(broker))
                found.idle_kb_each[called] = (found.idle_mb[called] * 1e6 - before) / 1e3 / IDLE_CLIENTS
        # In turn: virtual machines of languages warm up, and other load comes and goes.
        for _ in rounds_of(ROUNDS):
            for called, broker in brokers.items():
                _one_round(found, called, broker)
            _one_round_of_the_limit(found)
        show(f"requests in flight: {REQUESTS} of 200 bytes", found.rates, "1/s", missing=missing)
        show("their CPU time in the broker", found.cpu_us, "us", missing=missing)
        show("their CPU time in the two clients", found.clients_us, "us", missing=missing)
        show("bodies of 1 MiB", found.large, "MB/s", missing=missing)
        show("one request at a time", found.single, "us", scale=1e6, missing=missing)
        if not SHORT:
            show("1,000 idle clients, RSS", {each: [mb] for each, mb in found.idle_mb.items()}, "MB", missing=missing)
        alone, flooded = latency_beside_a_flood(brokers[OURS].port, 2, SINGLE)
    return _metrics(found) | {"flood_ratio": flooded / alone}


def _memory_mb(broker: Broker) -> Callable[[], float]:
    return lambda: broker.memory_bytes / 1e6


def _one_round(found: Found, called: str, broker: Broker) -> None:
    pids = broker.pids
    found.add(called, lambda: requests_per_second(*pair(broker.port, "reply", "request"), REQUESTS), pids)
    large = large_mb_per_second(*sender_and_receiver(broker.port), LARGE_COUNT)
    found.large.setdefault(called, []).append(large)
    found.single.setdefault(called, []).extend(single_requests(broker.port, SINGLE))


def _one_round_of_the_limit(found: Found) -> None:
    with server(_RELAY) as relay:
        ends = connect(relay.port), connect(relay.port)
        found.add(LIMIT, lambda: requests_per_second(*ends, REQUESTS), relay.pids)
    with server(_RELAY) as relay:
        large = large_mb_per_second(connect(relay.port), connect(relay.port), LARGE_COUNT)
        found.large.setdefault(LIMIT, []).append(large)


def _metrics(found: Found) -> dict[str, float]:
    rate = {name: median(values) for name, values in found.rates.items()}
    cpu = {name: median(values) for name, values in found.cpu_us.items()}
    large = {name: median(values) for name, values in found.large.items()}
    metrics = {
        "inflight64_per_s": rate[OURS],
        "inflight64_ratio_to_limit": rate[OURS] / rate[LIMIT],
        "large_mb_s": large[OURS],
        "large_ratio_to_limit": large[OURS] / large[LIMIT],
        "cpu_us_per_request": cpu[OURS],
        "cpu_ratio_to_limit": cpu[OURS] / cpu[LIMIT],
        "cpu_ratio_to_clients": cpu[OURS] / median(found.clients_us[OURS]),
    }
    peers = [name for name in EXTERNAL.values() if name in rate]
    if peers:
        metrics["inflight64_ratio_to_best_peer"] = rate[OURS] / max(rate[name] for name in peers)
        metrics["large_ratio_to_best_peer"] = large[OURS] / max(large[name] for name in peers)
        metrics["cpu_ratio_to_best_peer"] = cpu[OURS] / min(cpu[name] for name in peers)
    if found.idle_mb:
        metrics["idle1000_rss_mb"] = found.idle_mb[OURS]
        metrics["idle_kb_per_client"] = found.idle_kb_each[OURS]
    for kind, name in EXTERNAL.items():  # for benchmarks/site_model.py
        if name in rate:
            metrics[f"{kind}_inflight64_per_s"] = rate[name]
            metrics[f"{kind}_idle1000_rss_mb"] = found.idle_mb[name]
            metrics[f"{kind}_idle_kb_per_client"] = found.idle_kb_each[name]
    return metrics


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * IDLE_CLIENTS + 200
    if soft < wanted <= hard or hard == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
