"""What goes wrong with a QEMU VM, each with a state and a sentence, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import pytest_twisted
from pytest_twisted import ensureDeferred
from twisted.internet import reactor as _reactor
from twisted.internet.task import deferLater

from host_agent.hypervisors import host_memory, qemu_vm, qmp
from host_agent.hypervisors.base import HypervisorError, MachineSpec, MachineState
from host_agent.hypervisors.images import Image
from host_agent.hypervisors.leash import CONSOLE, CONSOLE_BYTES
from host_agent.hypervisors.qemu import QemuHypervisor
from host_agent.hypervisors.qemu_machine import QemuMachine
from host_agent.ledger import ledger_dir
from tests.contract.hypervisor_contract import Told, state_of

from .asker import AskerFactory
from .test_qemu_states import Guest

pytestmark = pytest.mark.vm
reactor: Any = _reactor
DEADLINE = 90.0  # seconds


@pytest.fixture
def spec(standin_image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MachineSpec:
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))
    directory = tmp_path / "vm-fails"
    directory.mkdir(mode=0o700)
    return MachineSpec("fails", "t-fails", standin_image, directory, 128, 1, {61613: AskerFactory()}, b"{}", Told())


@pytest_twisted.async_yield_fixture
async def guest(spec: MachineSpec) -> AsyncIterator[Guest]:
    machine = await QemuHypervisor(reactor).create(spec)
    try:
        await machine.start()
        askers = spec.services[61613]
        assert isinstance(askers, AskerFactory)
        made = Guest(machine, askers, None)  # type: ignore[arg-type]
        await made.again()
        yield made
    finally:
        await machine.destroy()
    assert list(ledger_dir().iterdir()) == []


def told(guest: Guest) -> Told:
    found = guest.machine.spec.on_state
    assert isinstance(found, Told)
    return found


@ensureDeferred
async def test_qemu_hangs(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "DEADLINE", 1.0)
    assert guest.machine.pid is not None
    os.kill(guest.machine.pid, signal.SIGSTOP)
    with pytest.raises(HypervisorError, match="QEMU hangs: no answer to stop within 1 s"):
        await guest.machine.pause()
    assert state_of(guest.machine) is MachineState.RUNNING
    with pytest.raises(HypervisorError, match="hangs"):
        await guest.machine.snapshot("one", lambda: None)
    assert await guest.machine.snapshots() == []
    await guest.machine.power_off().addTimeout(DEADLINE, reactor)
    assert state_of(guest.machine) is MachineState.STOPPED


@ensureDeferred
async def test_the_disk_is_full(guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zstd that fails as it does on a full disk, in the middle of the memory."""
    machine = guest.machine
    await machine.snapshot("one", lambda: None)
    programs = tmp_path / "bin"
    programs.mkdir()
    failing = programs / "zstd"
    failing.write_text("#!/bin/sh\nhead -c 1000000\necho 'zstd: error 70: No space left on device' >&2\nexit 70\n")
    failing.chmod(0o755)
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", f"{programs}:{path}")
    for save in (False, True):
        with pytest.raises(HypervisorError, match=r"cannot be kept: .*No space left on device"):
            kept = machine.save_state() if save else machine.snapshot("two", lambda: None)
            await kept.addTimeout(DEADLINE, reactor)
        assert state_of(machine) is MachineState.RUNNING
        assert await guest.asker.ask("echoes goes-on")
    monkeypatch.setenv("PATH", path)
    assert await machine.snapshots() == ["one"]
    assert len(list(guest.directory.glob("state-*"))) == 1
    await machine.restore("one")
    await guest.again()


@ensureDeferred
async def test_the_image_is_damaged(spec: MachineSpec, tmp_path: Path) -> None:
    place = tmp_path / "damaged"
    shutil.copytree(spec.image.directory, place)
    assert spec.image.kernel is not None
    for part in (spec.image.disk, spec.image.kernel):
        name = part.name
        whole = (place / name).read_bytes()
        (place / name).chmod(0o600)
        (place / name).write_bytes(b"no such thing" * 100)
        image = attrs.evolve(spec.image, directory=place, disk=place / spec.image.disk.name, kernel=place / "vmlinux")
        spec.directory.mkdir(mode=0o700, exist_ok=True)
        with pytest.raises(HypervisorError) as failure:
            machine = await QemuHypervisor(reactor).create(attrs.evolve(spec, image=image))
            try:
                await machine.start().addTimeout(DEADLINE, reactor)
            finally:
                await machine.destroy()
        assert "fails" in str(failure.value), "it names the VM"
        assert name in str(failure.value) or "kernel" in str(failure.value), str(failure.value)
        assert list(ledger_dir().iterdir()) == []
        (place / name).write_bytes(whole)


@ensureDeferred
async def test_the_console_is_kept_and_bounded(guest: Guest) -> None:
    assert await guest.asker.ask("flood_console 300")
    file = guest.directory / CONSOLE
    assert 0 < file.stat().st_size <= 3 * CONSOLE_BYTES
    assert "flood 299" in guest.machine.console_tail(5)
    await guest.machine.power_off()
    assert "flood" in guest.machine.console_tail(5), "it can be read after the end"


@ensureDeferred
async def test_the_guest_ends_while_a_state_is_written(guest: Guest) -> None:
    assert guest.machine.pid is not None
    pid = guest.machine.pid
    with pytest.raises(HypervisorError, match="cannot be kept"):
        await guest.machine.snapshot("one", lambda: os.kill(pid, signal.SIGKILL))
    for _ in range(100):
        if state_of(guest.machine) is MachineState.CRASHED:
            break
        await deferLater(reactor, 0.1)
    assert state_of(guest.machine) is MachineState.CRASHED
    assert "signal 9" in told(guest).reasons[-1]
    assert await guest.machine.snapshots() == []


@ensureDeferred
async def test_a_disk_without_a_system_its_screen_and_its_ends(
    spec: MachineSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a boot loader shows that finds nothing; a full disk, as QEMU tells it; an end for want of memory."""
    image = attrs.evolve(spec.image, kernel=None, initrd=None, cmdline="", warm_start=False)
    machine = await QemuHypervisor(reactor).create(attrs.evolve(spec, image=image))
    seen = spec.on_state
    assert isinstance(seen, Told)
    try:
        await machine.start()
        assert await machine.screen(tmp_path / "screen.png")
        picture = (tmp_path / "screen.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) < 100_000

        assert isinstance(machine, QemuMachine)
        machine.monitor_event("BLOCK_IO_ERROR", {"action": "stop", "nospace": True, "reason": "No space left"})
        machine.monitor_event("STOP", {})
        assert (machine.state, seen.reasons[-1]) == (
            MachineState.PAUSED,
            "this computer's disk is full: No space left",
        )
        await machine.resume()
        assert state_of(machine) is MachineState.RUNNING

        monkeypatch.setattr(qemu_vm, "oom_kills", lambda: 2**31)
        assert machine.pid is not None
        os.kill(machine.pid, signal.SIGKILL)
        for _ in range(300):
            if state_of(machine) is MachineState.CRASHED:
                break
            await deferLater(reactor, 0.1)
        assert seen.reasons[-1] == "this computer ran out of memory, and its system ended QEMU"
        assert not await machine.screen(tmp_path / "screen.png")
    finally:
        await machine.destroy()


def test_the_system_says_how_often_memory_was_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host_memory.oom_kills() >= 0
    monkeypatch.setattr(host_memory, "VMSTAT", tmp_path / "vmstat")
    assert host_memory.oom_kills() == 0
    (tmp_path / "vmstat").write_text("nr_free_pages 1\noom_kill 7\n")
    assert host_memory.oom_kills() == 7
