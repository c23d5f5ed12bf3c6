"""Saved states and snapshots of real VMs: memory, disk and clock, what they cost, and what cannot break them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import psutil
import pytest
import pytest_twisted
from pytest_twisted import ensureDeferred
from twisted.internet import reactor as _reactor

from host_agent import exchange
from host_agent.hypervisors import qemu_options, qemu_packing, qemu_vm
from host_agent.hypervisors.base import HypervisorError, Machine, MachineSpec, MachineState
from host_agent.hypervisors.images import Image
from host_agent.hypervisors.qemu import QemuHypervisor
from host_agent.hypervisors.qemu_machine import QemuMachine
from host_agent.hypervisors.qemu_options import KVM, accelerator_of
from tests.contract.hypervisor_contract import Told, state_of

from .asker import Asker, AskerFactory

pytestmark = pytest.mark.vm
reactor: Any = _reactor
DEADLINE = 90.0  # seconds


@attrs.define
class Guest:
    machine: Machine
    askers: AskerFactory
    asker: Asker

    @property
    def directory(self) -> Path:
        return self.machine.spec.directory

    async def again(self) -> Asker:
        """The guest's new connection after a restore."""
        self.asker = await self.askers.guests.get().addTimeout(DEADLINE, reactor)
        await self.asker.next()
        return self.asker


@contextlib.asynccontextmanager
async def running(standin_image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Guest]:
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))
    directory = tmp_path / "vm-states"
    directory.mkdir(mode=0o700)
    askers = AskerFactory()
    spec = MachineSpec("states", "t-states", standin_image, directory, 256, 1, {61613: askers}, b"{}", Told())
    machine = await QemuHypervisor(reactor).create(spec)
    try:
        await machine.start()
        guest = Guest(machine, askers, None)  # type: ignore[arg-type]
        await guest.again()
        yield guest
    finally:
        await machine.destroy()


@pytest_twisted.async_yield_fixture
async def guest(standin_image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Guest]:
    async with running(standin_image, tmp_path, monkeypatch) as guest:
        yield guest


@ensureDeferred
async def test_a_snapshot_is_memory_and_disk_of_one_moment(guest: Guest) -> None:
    assert await guest.asker.ask("write /home/vmwrapper/disk before")
    assert await guest.asker.ask("write /tmp/memory before")
    noted = []
    await guest.machine.snapshot("one", lambda: noted.append(state_of(guest.machine)))
    assert noted == [MachineState.RUNNING], "who looks from outside does not see the moment"
    assert await guest.asker.ask("echoes goes-on"), "its connections live"
    assert await guest.asker.ask("write /home/vmwrapper/disk after")
    assert await guest.asker.ask("write /tmp/memory after")
    random = await guest.asker.ask("random")
    await guest.machine.restore("one")
    asker = await guest.again()
    assert await asker.ask("read /home/vmwrapper/disk") == "before"
    assert await asker.ask("read /tmp/memory") == "before"
    assert await asker.ask("random") != random
    await guest.machine.restore("one")
    assert await (await guest.again()).ask("read /tmp/memory") == "before"


@ensureDeferred
async def test_the_clock_is_right_after_pause_save_and_restore(guest: Guest) -> None:
    machine = guest.machine
    await machine.pause()
    await machine.resume()
    await machine.save_state()
    assert state_of(machine) is MachineState.SAVED
    time.sleep(6)  # as long as nothing of it runs, there is nothing to wait for
    await machine.start()
    asker = await guest.again()
    before = time.time()
    assert before - 5 < await asker.ask("now") < time.time() + 0.5


@ensureDeferred
async def test_what_a_state_costs(guest: Guest, record_property: Any) -> None:
    """The goals with room for a loaded machine; `python -m benchmarks vm_start` measures."""
    machine, found = guest.machine, {}
    began = time.monotonic()
    await machine.snapshot("one", lambda: None)
    found["snapshot"] = time.monotonic() - began
    assert isinstance(machine, QemuMachine)
    found["pause"] = machine.stood_still
    began = time.monotonic()
    await machine.save_state()
    found["save"] = time.monotonic() - began
    found["MB"] = max(path.stat().st_size for path in guest.directory.glob("state-*")) / 1e6
    began = time.monotonic()
    await machine.start()
    found["start"] = time.monotonic() - began
    await guest.again()
    found["answers"] = time.monotonic() - began
    for name, value in found.items():
        record_property(name, value)
        print(f"{name}: {value:.3g}")
    assert found["MB"] <= 40
    assert 0 < found["pause"] < 5
    assert found["save"] < 20
    assert found["answers"] < 20


@ensureDeferred
async def test_damaged_states_are_refused_and_the_others_kept(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = guest.machine
    with monkeypatch.context() as short:
        short.setattr(qemu_packing, "spare_mb", lambda: 0)  # zstd packs it while the guest stands still
        await machine.snapshot("one", lambda: None)
    (first,) = guest.directory.glob("state-*")
    await machine.snapshot("two", lambda: None)
    (second,) = set(guest.directory.glob("state-*")) - {first}
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    with pytest.raises(HypervisorError, match="bytes instead of"):
        await machine.restore("two")
    assert state_of(machine) is MachineState.RUNNING, "it was not touched"
    second.write_bytes(whole[: len(whole) // 2] + bytes(1000) + whole[len(whole) // 2 + 1000 :])
    with pytest.raises(HypervisorError, match="cannot go back to two"):
        await machine.restore("two")
    assert state_of(machine) is MachineState.CRASHED
    await machine.restore("one")
    assert state_of(machine) is MachineState.RUNNING
    await guest.again()


@ensureDeferred
async def test_a_guest_goes_on_only_on_the_processor_that_it_knows(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = guest.machine
    assert isinstance(machine, QemuMachine)
    machine.accelerator, of_its_own = (*machine.accelerator[:3], "max,la57=on"), machine.accelerator
    await machine.save_state()  # as a host agent did that gave other processors
    machine.accelerator = of_its_own
    await machine.start()
    assert machine.pid is not None
    assert accelerator_of(psutil.Process(machine.pid).cmdline()) == (*of_its_own[:3], "max,la57=on")
    await guest.again()
    machine.accelerator = KVM
    await machine.snapshot("with-kvm", lambda: None)
    machine.accelerator = of_its_own
    with pytest.raises(HypervisorError, match="it ran with KVM then, and this host runs it emulated now"):
        await machine.restore("with-kvm")
    assert state_of(machine) is MachineState.RUNNING, "it was not touched"


@ensureDeferred
async def test_a_state_of_a_machine_that_had_no_exchange_disk_yet(
    standin_image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on where there is one, without it."""
    with monkeypatch.context() as before:
        for module in (qemu_options, qemu_vm):
            before.setattr(module, "has_exchange", lambda spec, accelerator: False)
        async with running(standin_image, tmp_path, monkeypatch) as guest:
            assert await guest.asker.ask("write /tmp/memory kept")
            assert not (guest.directory / exchange.NAME).exists()
            await guest.machine.snapshot("one", lambda: None)
            before.undo()
            await guest.machine.restore("one")
            asker = await guest.again()
            assert (guest.directory / exchange.NAME).exists()
            assert await asker.ask("read /tmp/memory") == "kept"
