"""Warm starts: clones of a template are quick, each with settings, clock and random numbers of its own."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import pytest_twisted
from pytest_twisted import ensureDeferred
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, gatherResults

from host_agent.hypervisors.base import Machine, MachineSpec, MachineState
from host_agent.hypervisors.images import Image, load_image
from host_agent.hypervisors.qemu import QemuHypervisor
from host_agent.hypervisors.qemu_templates import FOLDER, MEMORY
from host_agent.ledger import ledger_dir
from tests.contract.hypervisor_contract import Told, state_of

from .asker import Asker, AskerFactory

pytestmark = pytest.mark.vm
reactor: Any = _reactor
DEADLINE = 120.0  # seconds


@attrs.define
class Clones:
    """VMs of one image, whose templates nobody else uses."""

    image: Image
    directory: Path
    hypervisor: QemuHypervisor = attrs.field(factory=lambda: QemuHypervisor(reactor))
    machines: list[Machine] = attrs.field(factory=list)

    @property
    def templates(self) -> list[Path]:
        return sorted(path.parent for path in self.image.directory.parent.glob(f"{FOLDER}/*/{MEMORY}"))

    def start(self, name: str, memory_mb: int = 128) -> Deferred[tuple[Asker, dict[str, Any], Told]]:
        return Deferred.fromCoroutine(self._start(name, memory_mb)).addTimeout(DEADLINE, reactor)

    async def _start(self, name: str, memory_mb: int) -> tuple[Asker, dict[str, Any], Told]:
        directory = self.directory / f"vm-{name}"
        directory.mkdir(mode=0o700)
        askers, told = AskerFactory(), Told()
        config = json.dumps({"name": name}).encode()
        spec = MachineSpec(name, f"t-{name}", self.image, directory, memory_mb, 1, {61613: askers}, config, told)
        machine = await self.hypervisor.create(spec)
        self.machines.append(machine)
        await machine.start()
        asker = await askers.guests.get()
        hello = await asker.next()
        assert json.loads(hello["config"]) == {"name": name}
        assert (hello["mode"], hello["uid"]) == (0o400, 1000)
        return asker, hello, told


@pytest_twisted.async_yield_fixture
async def clones(standin_image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Clones]:
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))
    place = tmp_path / "images" / standin_image.name
    shutil.copytree(standin_image.directory, place)
    made = Clones(load_image(place), tmp_path)
    try:
        yield made
    finally:
        await gatherResults([machine.destroy() for machine in made.machines])
    assert list(ledger_dir().iterdir()) == []


@ensureDeferred
async def test_clones_have_what_is_their_own(clones: Clones) -> None:
    _, _, told = await clones.start("first")
    assert told.reasons[0].startswith("from a template")
    assert len(clones.templates) == 1
    began = time.monotonic()
    guests = await gatherResults([clones.start(name) for name in ("a", "b", "c")])
    print(f"three clones: {time.monotonic() - began:.2f} s")
    numbers = await gatherResults([asker.ask("random") for asker, _, _ in guests])
    assert len(set(numbers)) == 3
    before = time.time()
    for asker, _, _ in guests:
        # Clones that start together on an emulated machine may set their clocks late.
        assert before - 30 < await asker.ask("now") < time.time() + 5
    assert await guests[0][0].ask("write /home/vmwrapper/mine yes")
    assert await guests[1][0].ask("read /home/vmwrapper/mine") == ""
    assert len(clones.templates) == 1
    assert not list(clones.image.directory.parent.glob(f"{FOLDER}/vm-*"))


@ensureDeferred
async def test_other_hardware_has_another_template(clones: Clones) -> None:
    await clones.start("a", 128)
    await clones.start("b", 160)
    assert len(clones.templates) == 2


@ensureDeferred
async def test_a_clone_lives_on_without_its_template(clones: Clones) -> None:
    asker, _, _ = await clones.start("a")
    assert await asker.ask("write /home/vmwrapper/mine yes")
    machine = clones.machines[0]
    shutil.rmtree(clones.image.directory.parent / FOLDER)
    await machine.save_state()
    await machine.start()
    askers = machine.spec.services[61613]
    assert isinstance(askers, AskerFactory)
    asker = await askers.guests.get().addTimeout(DEADLINE, reactor)
    await asker.next()
    assert await asker.ask("read /home/vmwrapper/mine") == "yes"


@ensureDeferred
async def test_a_template_that_is_of_no_use_costs_only_time(clones: Clones) -> None:
    await clones.start("a")
    (template,) = clones.templates
    memory = template / MEMORY
    whole = memory.read_bytes()
    memory.chmod(0o600)
    memory.write_bytes(bytes(len(whole)))
    _, _, told = await clones.start("b")
    assert state_of(clones.machines[-1]) is MachineState.RUNNING
    assert MachineState.CRASHED not in told.states
    memory.write_bytes(whole[:1000])
    _, _, told = await clones.start("c")
    assert told.reasons[0].startswith("from a template")
    assert (template / MEMORY).stat().st_size > 1000, "it was made anew"
