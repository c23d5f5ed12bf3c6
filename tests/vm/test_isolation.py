"""Two real VMs on one host, seen from inside: neither reaches the other, nor pings what is outside."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import attrs
import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import reactor as _reactor
from twisted.internet.defer import gatherResults
from twisted.internet.protocol import Factory
from twisted.internet.task import deferLater
from twisted.protocols.wire import Echo

from host_agent.hypervisors.base import Machine, MachineSpec
from host_agent.hypervisors.images import Image
from host_agent.hypervisors.qemu import QemuHypervisor
from tests.contract.hypervisor_contract import Told

from .asker import Asker, AskerFactory

pytestmark = pytest.mark.vm
reactor: Any = _reactor
DEADLINE = 120.0  # seconds
PORT = 7777

# Programs in a guest may not send ICMP by themselves; a hostile one would be root there. This lets the stand-in do it.
PING = 'sysctl.net.ipv4.ping_group_range="0 65535"'


@ensureDeferred
async def test_two_guests_cannot_reach_each_other_nor_the_host(
    standin_image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))
    image = attrs.evolve(standin_image, cmdline=f"{standin_image.cmdline} {PING}", warm_start=False)
    hypervisor = QemuHypervisor(reactor)
    machines: list[Machine] = []
    factories = [AskerFactory(), AskerFactory()]
    try:
        for number, askers in enumerate(factories):
            directory = tmp_path / f"vm-{number}"
            directory.mkdir(mode=0o700)
            services: dict[int, Factory] = {61613: askers}
            if number == 0:
                services[PORT + 1] = Factory.forProtocol(Echo)
            spec = MachineSpec(f"g{number}", f"t-iso-{number}", image, directory, 128, 1, services, b"{}", Told())
            machines.append(await hypervisor.create(spec))
        await gatherResults([machine.start() for machine in machines])
        one, other = [await arrival(askers) for askers in factories]

        assert await one.ask("ping 127.0.0.1") == "answer"  # the test itself works
        assert await one.ask("ping 10.0.2.2") == "answer"  # that is QEMU itself, which passes nothing on
        for place in ("192.0.2.1", "10.0.2.100", "10.0.2.16", own_address()):
            assert await one.ask(f"ping {place}") != "answer", place

        assert await one.ask(f"listen {PORT}")
        assert await one.ask(f"reach tcp 127.0.0.1 {PORT}") == "open"  # it does listen
        assert await one.ask(f"reach tcp 10.0.2.15 {PORT}") == "open"
        assert await one.ask(f"reach tcp 10.0.2.100 {PORT + 1}") == "open"
        while await one.ask("heard") != ["tcp", "tcp"]:  # its own two
            await deferLater(reactor, 0.05)
        assert await other.ask(f"knock {PORT}") == []
        assert await other.ask(f"reach tcp 10.0.2.100 {PORT + 1}") != "open", (
            "that is a port of the other guest's alone"
        )
        assert await other.ask(f"reach udp 10.0.2.255 {PORT}") != "open"
        await deferLater(reactor, 0.5)
        assert await one.ask("heard") == ["tcp", "tcp"]
        assert not factories[0].guests.pending and not factories[1].guests.pending, "nobody has a second connection"
    finally:
        await gatherResults([machine.destroy() for machine in machines])


async def arrival(askers: AskerFactory) -> Asker:
    asker = await askers.guests.get().addTimeout(DEADLINE, reactor)
    await asker.next()
    return asker


def own_address() -> str:
    """This host's address on its network; one that is nobody's where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.connect(("192.0.2.1", 9))
            return str(one.getsockname()[0])
        except OSError:
            return "198.51.100.1"
