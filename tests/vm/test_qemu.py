"""The QEMU driver with real virtual machines: its contract, what a guest can reach, and how machines end."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import pytest_twisted
from pytest_twisted import ensureDeferred
from twisted.internet import reactor as _reactor
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import deferLater
from twisted.protocols.wire import Discard, Echo

from host_agent.hypervisors.base import Hypervisor, Machine, MachineSpec, MachineState
from host_agent.hypervisors.images import Image
from host_agent.hypervisors.qemu import QemuHypervisor
from tests.contract.hypervisor_contract import HypervisorContract, Told

from .asker import Asker, AskerFactory

pytestmark = pytest.mark.vm
reactor: Any = _reactor  # it has every interface that these tests use, which no one type says
BOOT_DEADLINE = 90.0  # seconds; an emulated machine boots in three on an idle host


class TestQemuHypervisor(HypervisorContract):
    def hypervisor(self) -> Hypervisor:
        return QemuHypervisor(reactor)

    def image(self, request: pytest.FixtureRequest) -> Image:
        found: Image = request.getfixturevalue("standin_image")
        return found


class Sink(Discard):
    """Swallows everything; its end of the connection is closed when the guest has sent all."""


class Source(Protocol):
    def dataReceived(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(bytes(int(data)))
        self.transport.loseConnection()


@attrs.define
class Guest:
    machine: Machine
    told: Told
    asker: Asker
    hello: dict[str, Any]


@pytest_twisted.async_yield_fixture
async def guest(standin_image: Image, tmp_path: Path) -> AsyncIterator[Guest]:
    directory = tmp_path / "a, strange 'name"
    directory.mkdir(mode=0o700)
    told, askers = Told(), AskerFactory()
    spec = MachineSpec(
        name="guest, with a comma",
        instance=f"t-{os.getpid()}-{abs(hash(tmp_path)):x}",
        image=standin_image,
        directory=directory,
        memory_mb=128,
        cpus=1,
        services={
            61613: askers,
            7: Factory.forProtocol(Echo),
            9: Factory.forProtocol(Sink),
            19: Factory.forProtocol(Source),
        },
        guest_config=b'{"secret": "s3cret"}',
        on_state=told,
    )
    machine = await QemuHypervisor(reactor).create(spec)
    try:
        await machine.start()
        asker = await askers.guests.get().addTimeout(BOOT_DEADLINE, reactor)
        yield Guest(machine, told, asker, await asker.next())
    finally:
        await machine.destroy()


async def until(machine: Machine, state: MachineState) -> None:
    for _ in range(300):
        if machine.state is state:
            return
        await deferLater(reactor, 0.1)
    raise AssertionError(f"{machine.state} instead of {state}; console:\n{machine.console_tail()}")


@ensureDeferred
async def test_settings_reach_the_guest_and_no_command_line(guest: Guest) -> None:
    assert json.loads(guest.hello["config"]) == {"secret": "s3cret"}
    assert (guest.hello["uid"], guest.hello["groups"]) == (1000, [])
    assert guest.hello["mode"] == 0o400
    assert b"s3cret" not in Path(f"/proc/{guest.machine.pid}/cmdline").read_bytes()


@ensureDeferred
async def test_guest_reaches_its_services_and_nothing_else(guest: Guest) -> None:
    with_listener = reactor.listenTCP(0, Factory.forProtocol(Echo), interface="127.0.0.1")
    try:
        port = with_listener.getHost().port
        assert await guest.asker.ask("reach tcp 10.0.2.100 7") == "open"
        for place in (
            f"tcp 10.0.2.2 {port}",
            f"tcp 10.0.2.100 {port}",
            f"tcp 127.0.0.1 {port}",
            "tcp 192.0.2.1 80",
            "tcp 10.0.2.3 53",
            "udp 10.0.2.3 53",
            "udp 192.0.2.1 53",
            "udp 10.0.2.2 67",
            "tcp 10.0.2.15 61613",
            "tcp 10.0.2.16 61613",
            f"tcp6 ::1 {port}",
            f"tcp6 fec0::2 {port}",
            "tcp6 2001:db8::1 80",
            "udp6 fec0::3 53",
        ):
            assert await guest.asker.ask(f"reach {place}") != "open", place
    finally:
        await with_listener.stopListening()


@ensureDeferred
async def test_connections_at_once_are_kept_apart(guest: Guest) -> None:
    heard = await guest.asker.ask("echo 20")
    assert heard == [True] * 20


@ensureDeferred
async def test_connection_survives_a_pause(guest: Guest) -> None:
    await guest.machine.pause()
    answer = guest.asker.ask("echo 1")
    await deferLater(reactor, 1.0)
    assert not answer.called
    await guest.machine.resume()
    assert await answer == [True]


@ensureDeferred
async def test_numbers(guest: Guest, record_property: Any) -> None:
    """Not a benchmark, but what everything else is built on must not become ten times slower unseen."""
    found = {}
    for line, least in (("send 8", 2.0), ("receive 16", 5.0), ("sha256 2", 10.0)):
        before, began = guest.machine.cpu_seconds(), time.monotonic()
        found[line] = await guest.asker.ask(line)
        # As if the VM had a processor to itself: it has the lowest priority, and others may need them.
        found[line] *= (time.monotonic() - began) / (guest.machine.cpu_seconds() - before)
        assert found[line] > least, line
    found["round trips"] = await guest.asker.ask("round_trips 50")
    assert found["round trips"] > 33, "Nagle's algorithm is at work"
    for name, value in found.items():
        record_property(name, value)
        print(f"{name}: {value:.4g}")


@ensureDeferred
async def test_guest_powers_itself_off(guest: Guest) -> None:
    guest.asker.say("off")
    await until(guest.machine, MachineState.STOPPED)
    assert "guest" in guest.told.reasons[-1]


@ensureDeferred
async def test_cpu_time_is_known_after_the_guest_powered_itself_off(guest: Guest) -> None:
    guest.asker.say("off")
    await until(guest.machine, MachineState.STOPPED)
    assert guest.machine.cpu_seconds() > 0


@ensureDeferred
async def test_qemu_is_killed(guest: Guest) -> None:
    assert guest.machine.pid is not None
    os.kill(guest.machine.pid, signal.SIGKILL)
    await until(guest.machine, MachineState.CRASHED)
    assert "signal 9" in guest.told.reasons[-1]


@ensureDeferred
async def test_agent_is_started_again(guest: Guest) -> None:
    """The stand-in ends when its connection does; the init starts it anew."""
    factory = guest.machine.spec.services[61613]
    assert isinstance(factory, AskerFactory)
    guest.asker.hang_up()
    again = await factory.guests.get().addTimeout(BOOT_DEADLINE, reactor)
    assert (await again.next())["uid"] == 1000
