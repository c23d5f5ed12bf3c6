"""A VM is a good neighbour: lowest priority, its share of the processors and no more, nothing while it is paused."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import reactor as _reactor
from twisted.internet.task import deferLater

from host_agent.hypervisors.base import MachineSpec
from host_agent.hypervisors.images import Image
from host_agent.hypervisors.qemu import QemuHypervisor
from host_agent.hypervisors.qemu_options import OVERHEAD_MB
from tests.contract.hypervisor_contract import Told

from .asker import AskerFactory

pytestmark = pytest.mark.vm
reactor: Any = _reactor
DEADLINE = 120.0  # seconds


@ensureDeferred
async def test_a_vm_keeps_to_its_share(standin_image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))
    directory = tmp_path / "vm-gentle"
    directory.mkdir(mode=0o700)
    askers = AskerFactory()
    spec = MachineSpec("gentle", "t-gentle", standin_image, directory, 128, 1, {61613: askers}, b"{}", Told())
    machine = await QemuHypervisor(reactor).create(spec)
    try:
        await machine.start()
        asker = await askers.guests.get().addTimeout(DEADLINE, reactor)
        await asker.next()
        assert machine.pid is not None
        qemu = psutil.Process(machine.pid)
        assert qemu.nice() == 19
        assert qemu.ionice().ioclass == psutil.IOPRIO_CLASS_IDLE
        assert qemu.rlimit(psutil.RLIMIT_DATA)[0] == (128 + OVERHEAD_MB) << 20
        status = Path(f"/proc/{qemu.pid}/status").read_text()
        data_mb = int(next(line for line in status.splitlines() if line.startswith("VmData")).split()[1]) >> 10
        print(f"data: {data_mb} MB")
        assert data_mb < 128 + OVERHEAD_MB * 0.6, "the limit is too near to what a healthy QEMU needs"
        machine.limit(0.25)
        working = asker.ask("sha256 4")
        before, began = machine.cpu_seconds(), time.monotonic()
        await working
        share = (machine.cpu_seconds() - before) / (time.monotonic() - began)
        print(f"share: {share:.2f}")
        assert 0 < share < 0.4
        await machine.snapshot("one", lambda: None)
        assert await asker.ask("echoes goes-on")
        await machine.pause()
        before = machine.cpu_seconds()
        await deferLater(reactor, 2.0)
        assert machine.cpu_seconds() - before < 0.1
        await machine.resume()
        assert await asker.ask("echoes goes-on")
    finally:
        await machine.destroy()
