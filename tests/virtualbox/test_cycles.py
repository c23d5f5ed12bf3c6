"""What the driver costs, and that nothing piles up. VMWRAPPER_LONG=1 is the long form: 100 cycles, a whole minute."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_twisted
from pytest_twisted import ensureDeferred
from twisted.internet import reactor as _reactor
from twisted.internet.task import deferLater

from host_agent.hypervisors.base import MachineState
from host_agent.hypervisors.images import Image
from host_agent.hypervisors.virtualbox.driver import VirtualBoxHypervisor
from host_agent.ledger import ledger_dir

from . import guest
from .test_real import nothing_is_left, spec_for

reactor: Any = _reactor
LONG = bool(os.environ.get("VMWRAPPER_LONG"))
CYCLES = 100 if LONG else 5
WATCHED = 60.0 if LONG else 10.0  # seconds
MOST = 0.2  # percent of a core


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return guest.image(tmp_path_factory.mktemp("cycles") / "image")


@pytest.fixture
def driver() -> Iterator[VirtualBoxHypervisor]:
    made = VirtualBoxHypervisor(reactor)
    yield made
    pytest_twisted.blockon(made.close())


def machine_processes() -> list[str]:
    """Processes that carry VMs; in the chroot their names are the launcher's."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = " ".join(process.info["cmdline"] or [])
        if "VBoxHeadless" in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(words)
    return found


@ensureDeferred
async def test_cycles_leave_nothing(driver: VirtualBoxHypervisor, image: Image, tmp_path: Path) -> None:
    before, descriptors = image.disk.read_bytes(), 0
    for cycle in range(CYCLES):
        spec = spec_for(image, tmp_path / f"vm{cycle}")
        machine = await driver.create(spec)
        try:
            await machine.start()
            await machine.snapshot("kept", lambda: None)
            await machine.restore("kept")
            assert machine.state is MachineState.RUNNING
        finally:
            await machine.destroy()
        assert not spec.directory.exists()
        assert list(ledger_dir().iterdir()) == []
        assert machine_processes() == []
        worker = psutil.Process(driver.calls.pid)
        if cycle == 1:
            descriptors = worker.num_fds() + psutil.Process().num_fds()
    assert worker.num_fds() + psutil.Process().num_fds() <= descriptors + 2
    nothing_is_left()
    assert image.disk.read_bytes() == before
    print(f"\n{CYCLES} cycles; the worker has {worker.memory_info().rss >> 20} MB")


@ensureDeferred
async def test_cost_while_a_machine_runs(driver: VirtualBoxHypervisor, image: Image, tmp_path: Path) -> None:
    machine = await driver.create(spec_for(image, tmp_path / "vm"))
    try:
        await machine.start()
        await deferLater(reactor, 2.0)
        ours = [psutil.Process(), psutil.Process(driver.calls.pid)]
        gc.collect()
        gc.freeze()  # what all tests before have left is not searched for garbage at this driver's cost
        began = [process.cpu_times() for process in ours]
        await deferLater(reactor, WATCHED)
        now = [process.cpu_times() for process in ours]
        used = [b.user + b.system - a.user - a.system for a, b in zip(began, now, strict=True)]
        percent = sum(used) / WATCHED * 100
        print(f"\nover {WATCHED:.0f} s: host side {used[0]:.3f} s, worker {used[1]:.3f} s of CPU: {percent:.2f} %")
        # A tick of the clock that this is counted in is 10 ms.
        assert percent <= MOST + 100 * 0.02 / WATCHED
    finally:
        gc.unfreeze()
        await machine.destroy()
