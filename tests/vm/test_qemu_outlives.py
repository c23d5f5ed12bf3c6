"""A VM outlives a host agent that is killed: the next one has it, or nothing of it is left."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import psutil
import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from host_agent.hypervisors import qemu
from host_agent.hypervisors.base import HeldByAnother, Machine, MachineSpec, MachineState
from host_agent.hypervisors.images import Image
from host_agent.hypervisors.qemu import QemuHypervisor
from host_agent.ledger import ledger_dir, sweep
from tests.contract.hypervisor_contract import Told, state_of

from .asker import AskerFactory

pytestmark = pytest.mark.vm
reactor: Any = _reactor
DEADLINE = 90.0  # seconds
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))


@attrs.define
class Holder:
    """Another process that has a VM."""

    image: Image
    directory: Path
    process: subprocess.Popen[str] | None = None
    qemu: int | None = None
    told: Told = attrs.field(factory=Told)
    askers: AskerFactory = attrs.field(factory=AskerFactory)

    def start(self, grace: float, *more: str) -> None:
        self.directory.mkdir(mode=0o700)
        words = [sys.executable, "-m", "tests.vm.holder", str(self.image.directory), str(self.directory)]
        self.process = subprocess.Popen(
            [*words, "t-held", str(grace), *more], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("held"):
                number = line.split()[1]
                self.qemu = int(number) if number != "None" else None
                return
        raise AssertionError("no guest spoke")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def spec(self) -> MachineSpec:
        services = {61613: self.askers}
        return MachineSpec("held", "t-held", self.image, self.directory, 128, 1, services, b"{}", self.told)

    async def adopt(self) -> Machine | None:
        return await QemuHypervisor(reactor, 5.0).adopt(self.spec()).addTimeout(DEADLINE, reactor)


@pytest.fixture
def holder(standin_image: Image, tmp_path: Path) -> Iterator[Holder]:
    made = Holder(standin_image, tmp_path / "vm-held")
    yield made
    if made.process is not None:
        made.process.kill()
        made.process.wait()
        assert made.process.stdout is not None
        made.process.stdout.close()


async def gone(pid: int | None) -> None:
    assert pid is not None
    for _ in range(600):
        if not psutil.pid_exists(pid):
            return
        await deferLater(reactor, 0.1)
    raise AssertionError(f"process {pid} is still there")


@ensureDeferred
async def test_the_next_agent_has_the_vm(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    holder.start(60.0)
    with monkeypatch.context() as patched:
        patched.setattr(qemu, "OWNER_ENDS", 0.2)
        with pytest.raises(HeldByAnother, match="another host agent"):
            await holder.adopt()
    waiting = Deferred.fromCoroutine(holder.adopt())
    await deferLater(reactor, 0.1)
    assert not waiting.called, "it waits for the end of the one that has the VM"
    assert sweep() == []
    holder.kill()
    assert sweep() == [], "its leash looks after it"
    machine = await waiting
    assert machine is not None
    try:
        assert (state_of(machine), machine.pid) == (MachineState.RUNNING, holder.qemu)
        assert machine.cpu_seconds() > 0
        asker = await holder.askers.guests.get().addTimeout(DEADLINE, reactor)
        assert (await asker.next())["uid"] == 1000, "the guest found the new agent's service port"
        await machine.pause()
        await machine.resume()
        assert await asker.ask("echoes something") is True
        assert isinstance(machine.console_tail(), str)
        await machine.snapshot("one", lambda: None)
        await machine.power_off()
        assert state_of(machine) is MachineState.STOPPED
        await gone(holder.qemu)
    finally:
        await machine.destroy()
    assert not holder.directory.exists()
    assert list(ledger_dir().iterdir()) == []


@ensureDeferred
async def test_a_paused_vm_is_found_paused(holder: Holder) -> None:
    holder.start(60.0)
    holder.kill()
    machine = await holder.adopt()
    assert machine is not None
    await machine.pause()
    await machine.leave()
    again = await holder.adopt()
    assert again is not None
    assert state_of(again) is MachineState.PAUSED
    await again.resume()
    await again.leave()
    once_more = await holder.adopt()
    assert once_more is not None
    assert state_of(once_more) is MachineState.RUNNING
    await once_more.destroy()


@ensureDeferred
async def test_nobody_comes(holder: Holder) -> None:
    holder.start(1.0)
    holder.kill()
    await gone(holder.qemu)
    for _ in range(100):
        if not holder.directory.exists() and not list(ledger_dir().iterdir()):
            break
        await deferLater(reactor, 0.1)
    assert not holder.directory.exists()
    assert list(ledger_dir().iterdir()) == []
    assert await holder.adopt() is None


@ensureDeferred
async def test_nobody_comes_but_a_snapshot_is_kept(holder: Holder) -> None:
    holder.start(0.5, "snapshot")
    holder.kill()
    await gone(holder.qemu)
    machine = await holder.adopt()
    assert machine is not None
    try:
        assert state_of(machine) is MachineState.CRASHED
        assert await machine.snapshots() == ["kept"]
        await machine.restore("kept")
        assert state_of(machine) is MachineState.RUNNING
        asker = await holder.askers.guests.get().addTimeout(DEADLINE, reactor)
        assert (await asker.next())["uid"] == 1000
    finally:
        await machine.destroy()


@ensureDeferred
async def test_a_saved_vm_needs_no_agent(holder: Holder) -> None:
    holder.start(0.5, "save")
    assert holder.qemu is None
    holder.kill()
    sweep()
    assert holder.directory.exists()
    machine = await holder.adopt()
    assert machine is not None
    try:
        assert state_of(machine) is MachineState.SAVED
        used = machine.cpu_seconds()
        assert used > 0
        await machine.start()
        assert state_of(machine) is MachineState.RUNNING
        assert machine.cpu_seconds() >= used
        asker = await holder.askers.guests.get().addTimeout(DEADLINE, reactor)
        assert (await asker.next())["uid"] == 1000
    finally:
        await machine.destroy()
    assert os.listdir(ledger_dir()) == []


@pytest.mark.parametrize("after", [0.05, 0.25, 0.4, 0.55, 0.8])
@ensureDeferred
async def test_an_agent_is_killed_while_it_replaces_a_snapshot(holder: Holder, after: float) -> None:
    """At any moment there is one that can be restored, and the VM runs on."""
    holder.start(60.0, "loop")
    await deferLater(reactor, after)
    holder.kill()
    machine = await holder.adopt()
    assert machine is not None
    try:
        assert (state_of(machine), machine.pid) == (MachineState.RUNNING, holder.qemu)
        assert await machine.snapshots() == ["kept"]
        assert len(list(holder.directory.glob("state-*"))) == 1
        asker = await holder.askers.guests.get().addTimeout(DEADLINE, reactor)
        await asker.next()
        assert await asker.ask("echoes goes-on")
        await machine.snapshot("another", lambda: None)
        await machine.restore("kept")
        asker = await holder.askers.guests.get().addTimeout(DEADLINE, reactor)
        await asker.next()
        assert await asker.ask("echoes goes-on")
        told = subprocess.run(
            ["qemu-img", "snapshot", "-U", "-l", str(machine.spec.directory / "disk.qcow2")],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert told.count("vmwrapper-") == 2, "no stray is left in the disk"
    finally:
        await machine.destroy()


@ensureDeferred
async def test_a_leash_that_is_killed_takes_the_vm_along(holder: Holder) -> None:
    """And it is told only when QEMU has let go of the disk, which another one is to have."""
    there: list[bool] = []
    told = holder.told

    def watch(state: MachineState, reason: str) -> None:
        if state is MachineState.CRASHED:
            there.append(runs(holder.qemu))
        told(state, reason)

    holder.told = watch  # type: ignore[assignment]
    holder.start(60.0)
    holder.kill()
    machine = await holder.adopt()
    assert machine is not None
    assert machine.pid is not None
    leash = psutil.Process(machine.pid).parent()
    assert leash is not None
    leash.kill()
    await gone(holder.qemu)
    for _ in range(100):
        if state_of(machine) is MachineState.CRASHED:
            break
        await deferLater(reactor, 0.1)
    assert "leash was killed" in told.reasons[-1]
    assert there == [False]
    await machine.destroy()


def runs(pid: int | None) -> bool:
    """Whether there is a process that holds anything."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
