"""A host agent whose guests are simulated (`scale_guests.py`), in a process of its own; the rest of it is real.

    python -m benchmarks.scale_host FOLDER SWARMS [BROKER_SETTINGS]

Prints its endpoint as a host agent does, and ends when it is asked to.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import ProcessProtocol

from benchmarks.own_host import reactor, serve
from common.config import GuestConfig
from common.files import write_private
from common.logs import start_logging
from host_agent.admission import Admission, Ticket
from host_agent.agent import build_host_agent
from host_agent.broker.settings import BrokerSettings
from host_agent.hypervisors.base import Capabilities, Machine, MachineSpec, Requirement
from host_agent.hypervisors.fake import FakeMachine, Script
from host_agent.state import open_state


class Swarm(ProcessProtocol):
    """A process with many guests."""

    def __init__(self, runs: Path) -> None:
        argv = [sys.executable, "-m", "benchmarks.scale_guests", str(runs)]
        self._process = reactor.spawnProcess(self, sys.executable, argv, env=None, childFDs={0: "w", 1: 2, 2: 2})

    def tell(self, order: dict[str, str]) -> None:
        self._process.write(json.dumps(order).encode() + b"\n")


class SimulatedMachine(FakeMachine):
    """Its guest is one of a swarm."""

    def __init__(self, spec: MachineSpec, swarm: Swarm) -> None:
        super().__init__(reactor, spec, Script())
        self._swarm = swarm
        self._home = str(spec.directory / "home")
        self._ports: list[IListeningPort] = []

    def start(self) -> Deferred[None]:
        if not self._ports:
            text = self.spec.guest_config.decode("utf-8")
            for port, factory in self.spec.services.items():
                listening = reactor.listenTCP(0, factory, interface="127.0.0.1")
                self._ports.append(listening)
                text = text.replace(str(port), str(listening.getHost().port))
            Path(self._home).mkdir()
            config = Path(self._home, "config.json")
            write_private(config, text.encode("utf-8"))
            GuestConfig.load(config)
            self._swarm.tell({"start": self._home})
        return super().start()

    def destroy(self) -> Deferred[None]:
        if self._ports:
            self._swarm.tell({"stop": self._home})
            for port in self._ports:
                port.stopListening()
            self._ports.clear()
        return super().destroy()


class SimulatedHypervisor:
    name = "simulated"
    capabilities = Capabilities(image=False)
    guest_gateway = "127.0.0.1"

    def __init__(self, folder: Path, swarms: int) -> None:
        self._swarms = itertools.cycle([Swarm(folder / f"runs-{number}") for number in range(swarms)])

    def requirements(self) -> Deferred[list[Requirement]]:
        return succeed([])

    def create(self, spec: MachineSpec) -> Deferred[Machine]:
        return succeed(SimulatedMachine(spec, next(self._swarms)))

    def adopt(self, spec: MachineSpec) -> Deferred[Machine | None]:
        return succeed(None)


class RoomForAll(Admission):
    """Real guests would need the memory and the processors that a host counts; simulated ones need neither."""

    async def enter(self, instance: str, *_: Any) -> Ticket:
        return Ticket(self._place / instance, -1)


def main() -> None:
    folder, swarms = Path(sys.argv[1]), int(sys.argv[2])
    external = BrokerSettings.load(Path(sys.argv[3])) if len(sys.argv) > 3 else None
    start_logging("scale-host")
    hypervisor = SimulatedHypervisor(folder, swarms)
    agent = build_host_agent(reactor, hypervisor, open_state(folder / "state"), reactor.stop, external)
    agent._vms._admission = RoomForAll(reactor)
    serve(agent)


if __name__ == "__main__":
    main()
