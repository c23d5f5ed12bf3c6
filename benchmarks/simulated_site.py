"""Hosts and guests that are heard through a broker only: what they tell is made up, how they tell it is real.

    python -m benchmarks.simulated_site FOLDER --hosts 20 --guests 1000 --rate 100 [--through SETTINGS]

Without SETTINGS of an external broker, an embedded one listens. Prints a line when all have begun; the events, with
their times, go to FOLDER/events.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from twisted.internet import reactor as default_reactor
from twisted.internet.task import LoopingCall

from benchmarks.simulated_host import Shown, SimulatedHost
from common import messages
from common.broker_address import BrokerAddress, Credentials, Dialect
from common.broker_link import BrokerLink
from common.messages import Beacon, Envelope
from host_agent.broker.embedded import EmbeddedBroker
from host_agent.broker.principals import allow_all
from host_agent.broker.settings import BrokerSettings
from host_agent.status import StatusReporter

BEACON_EVERY = 10.0
TICK = 0.1

reactor: Any = default_reactor


class Site:
    """`rate` is that of all events a second."""

    def __init__(self, folder: Path, hosts: int, guests: int, rate: float, external: BrokerSettings | None) -> None:
        self._events = (folder / "events").open("w", buffering=1)
        each = guests // hosts
        self.hosts = [
            SimulatedHost(reactor, f"h-site-{number}", each, rate / hosts, seed=number, first=number * each)
            for number in range(hosts)
        ]
        self._guests = [(f"lab-{n // each}", vm) for n, vm in enumerate(vm for host in self.hosts for vm in host.vms)]
        self._next = 0.0
        self._waiting = 2
        self._links: list[Any] = []
        self.port = 0
        if external is None:
            broker = EmbeddedBroker(reactor, authenticate=lambda login, passcode: allow_all(login))
            broker.listen("127.0.0.1", 0).addCallback(self._listening)
        else:
            self._connect(
                external.brokers, [external.host, Credentials(*next(iter(external.guests.items())))], external
            )

    def _listening(self, port: Any) -> None:
        self.port = port.getHost().port
        self._connect(
            (BrokerAddress("127.0.0.1", self.port),), [Credentials(name, "any") for name in ("host", "guest")]
        )

    def _connect(
        self, places: tuple[BrokerAddress, ...], logins: list[Credentials], external: BrokerSettings | None = None
    ) -> None:
        """What hosts say goes through one connection, what guests say through the other."""
        dialect = Dialect.STOMP if external is None else external.dialect
        self._links = [BrokerLink(reactor, places, login, [], self, dialect) for login in logins]
        for link in self._links:
            link.start()

    # -- the broker

    def broker_connected(self) -> None:
        self._waiting -= 1
        if self._waiting == 0:
            reactor.callLater(0, self._begin)

    def broker_disconnected(self, reason: str) -> None:
        raise AssertionError(reason)

    def broker_message(self, destination: str, body: bytes) -> None:
        """Nothing is for us."""

    def _begin(self) -> None:
        for number, host in enumerate(self.hosts):
            shown: Any = Shown(host)
            reporter = StatusReporter(
                reactor, f"lab-{number}", f"h-site-{number}", shown, host.events, self._links[0].send
            )
            host.events.listeners.append(self._note)
            host.live()
            # Host agents were not all started in the same moment.
            reactor.callLater(number * 10.0 / len(self.hosts), reporter.start)
        LoopingCall(self._beacons).start(TICK)
        print(json.dumps({"port": self.port}), flush=True)

    def _note(self, event: dict[str, Any]) -> None:
        self._events.write(json.dumps([event["text"], event["time"]]) + "\n")

    def _beacons(self) -> None:
        before, self._next = self._next, self._next + len(self._guests) * TICK / BEACON_EVERY
        for number in range(int(before), int(self._next)):
            host, vm = self._guests[number % len(self._guests)]
            beacon = Beacon(
                guest=vm["instance"], uptime_s=60.0, load=0.5, commands=vm["commands"], memory_bytes=80_000_000,
                host=host, name=vm["vm"], agent_version="0.1.0", memory_total_bytes=2**28, cpus=1, cpu_s=30.0,
            )  # fmt: skip
            self._links[1].send(messages.PRESENCE, messages.encode(Envelope(beacon, "s", "")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hosts", type=int, default=20)
    parser.add_argument("--guests", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=100.0, help="events a second")
    parser.add_argument("--through", type=Path, help="settings of an external broker")
    options = parser.parse_args()
    external = BrokerSettings.load(options.through) if options.through is not None else None
    site = Site(options.folder, options.hosts, options.guests, options.rate, external)
    assert site.hosts
    reactor.run()
    os._exit(0)


if __name__ == "__main__":
    main()
