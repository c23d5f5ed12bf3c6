"""KVM passes its probe, and gives up on a guest later: one sentence, and the next VM is emulated.

Everything but KVM is real (`kvm_qemu.py`).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import pytest_twisted
from pytest_twisted import ensureDeferred
from twisted.internet import reactor as _reactor
from twisted.internet.defer import gatherResults
from twisted.internet.task import deferLater
from twisted.internet.unix import Port

from host_agent.hypervisors import kvm, qemu_machine
from host_agent.hypervisors.base import HypervisorError, Machine, MachineSpec, MachineState
from host_agent.hypervisors.images import Image, load_image
from host_agent.hypervisors.qemu import QemuHypervisor
from host_agent.hypervisors.qemu_machine import QemuMachine
from host_agent.hypervisors.qemu_options import KVM, QEMU, TCG
from host_agent.hypervisors.qemu_templates import FOLDER
from host_agent.ledger import ledger_dir
from tests.contract.hypervisor_contract import Told, state_of

from .asker import AskerFactory
from .checkpointed import CheckpointedJob

pytestmark = pytest.mark.vm
reactor: Any = _reactor
DEADLINE = 120.0  # seconds
HERE = Path(__file__).parent

WORDS = "KVM internal error. Suberror: 1, emulation failure"
SENTENCE = f"KVM gave up on the guest ({WORDS}); VMs are emulated from now on"
REMARK = f"emulated, for KVM cannot be used: it gave up on a guest: {WORDS}"


@attrs.define
class Kvm:
    """A host's KVM, as its host agents see it."""

    device: Path
    end: Path  # as soon as this file is there, it gives up


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kvm:
    made = Kvm(tmp_path / "kvm", tmp_path / "end")
    made.device.touch()
    program = tmp_path / "bin" / QEMU
    program.parent.mkdir()
    words = (sys.executable, "-I", "-S", str(HERE / "kvm_qemu.py"), str(shutil.which(QEMU)), str(made.end))
    program.write_text(f'#!/bin/sh\nexec {" ".join(words)} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))
    monkeypatch.setenv("VMWRAPPER_TEST_KVM", str(made.device))
    monkeypatch.setattr(kvm, "DEVICE", made.device)
    return made


@attrs.define
class Vms:
    """VMs of one image, whose templates nobody else uses."""

    image: Image
    directory: Path
    made: list[QemuMachine] = attrs.field(factory=list)

    def spec(self, name: str) -> MachineSpec:
        directory = self.directory / f"vm-{name}"
        directory.mkdir(mode=0o700, exist_ok=True)
        config = json.dumps({"name": name}).encode()
        return MachineSpec(name, f"t-{name}", self.image, directory, 128, 1, {61613: AskerFactory()}, config, Told())

    async def make(self, name: str, warm: bool, hypervisor: QemuHypervisor | None = None) -> QemuMachine:
        creating = (hypervisor or QemuHypervisor(reactor, warm=warm)).create(self.spec(name))
        return self.keep(await creating.addTimeout(DEADLINE, reactor))

    async def running(self, name: str) -> QemuMachine:
        """One that was booted, and whose guest has answered."""
        machine = await self.make(name, warm=False)
        await machine.start()
        await self.answers(machine)
        return machine

    def keep(self, machine: Machine) -> QemuMachine:
        assert isinstance(machine, QemuMachine)
        self.made.append(machine)
        return machine

    async def answers(self, machine: QemuMachine) -> None:
        askers = machine.spec.services[61613]
        assert isinstance(askers, AskerFactory)
        asker = await askers.guests.get().addTimeout(DEADLINE, reactor)
        assert json.loads((await asker.next())["config"]) == {"name": machine.spec.name}


@pytest_twisted.async_yield_fixture
async def vms(host: Kvm, standin_image: Image, tmp_path: Path) -> AsyncIterator[Vms]:
    place = tmp_path / "images" / standin_image.name
    shutil.copytree(standin_image.directory, place)
    made = Vms(load_image(place), tmp_path)
    try:
        yield made
    finally:
        await gatherResults([machine.destroy() for machine in made.made])
    ports = [each for each in reactor.getReaders() if isinstance(each, Port)]
    assert not [each for each in ports if str(tmp_path).encode() in each.getHost().name]
    assert list(ledger_dir().iterdir()) == []


async def crashed(machine: QemuMachine) -> str:
    """When it has crashed: why."""
    told = machine.spec.on_state
    assert isinstance(told, Told)
    for _ in range(300):
        if state_of(machine) is MachineState.CRASHED:
            assert MachineState.PAUSED not in told.states
            return told.reasons[-1]
        await deferLater(reactor, 0.05)
    raise AssertionError(f"it is {machine.state.value}")


@ensureDeferred
async def test_on_a_guest_that_runs(vms: Vms, host: Kvm) -> None:
    """Its checkpoints need KVM, and are refused; the next VM is emulated, with every host agent to come."""
    machine = await vms.running("first")
    assert machine.accelerator == KVM
    await machine.snapshot("one", lambda: None)
    host.end.touch()
    assert await crashed(machine) == SENTENCE
    assert machine.pid is None
    with pytest.raises(HypervisorError, match="it ran with KVM then, and this host runs it emulated now"):
        await machine.restore("one")
    assert state_of(machine) is MachineState.CRASHED

    again = await vms.running("second")
    assert again.accelerator == TCG
    told = again.spec.on_state
    assert isinstance(told, Told)
    assert told.reasons[0] == REMARK


@ensureDeferred
async def test_before_anybody_is_there_to_hear_of_it(vms: Vms, host: Kvm) -> None:
    """At the guest's first instruction: QEMU tells its events to nobody yet."""
    machine = await vms.make("early", warm=False)
    host.end.write_text("unheard")
    with pytest.raises(HypervisorError) as failure:
        await machine.start()
    assert str(failure.value) == f"the VM early did not start: {SENTENCE}"
    assert await crashed(machine) == SENTENCE


@ensureDeferred
async def test_while_a_template_boots(vms: Vms, host: Kvm) -> None:
    """Who waits for the VM gets it emulated, from a template that is so, too."""
    host.end.touch()
    machine = await vms.make("box", warm=True)
    assert machine.accelerator == TCG
    await machine.start()
    await vms.answers(machine)
    told = machine.spec.on_state
    assert isinstance(told, Told)
    assert told.reasons[0] == f"from a template, {REMARK}"
    assert len(list(vms.image.directory.parent.glob(f"{FOLDER}/*/"))) == 1


@ensureDeferred
async def test_on_a_guest_from_a_template(vms: Vms, host: Kvm) -> None:
    hypervisor = QemuHypervisor(reactor, warm=True)
    machine = await vms.make("box", warm=True, hypervisor=hypervisor)
    assert machine.accelerator == KVM
    host.end.touch()
    await machine.start()
    assert await crashed(machine) == SENTENCE
    assert (await vms.make("next", warm=False, hypervisor=hypervisor)).accelerator == TCG


@ensureDeferred
async def test_when_a_guest_goes_on_from_a_state(vms: Vms, host: Kvm) -> None:
    machine = await vms.running("box")
    await machine.save_state()
    host.end.touch()
    await machine.start()
    assert await crashed(machine) == SENTENCE
    assert await machine.snapshots() == ["saved"]
    with pytest.raises(HypervisorError, match="cannot go back to saved: it ran with KVM then"):
        await machine.restore("saved")


@pytest.mark.parametrize("keeps", [False, True])
@ensureDeferred
async def test_while_no_host_agent_is_there(vms: Vms, host: Kvm, monkeypatch: pytest.MonkeyPatch, keeps: bool) -> None:
    monkeypatch.setattr(qemu_machine, "accelerator_of", lambda argv: KVM)  # in truth it is emulated
    machine = await vms.running("box")
    if keeps:
        await machine.snapshot("one", lambda: None)
    await machine.leave()
    vms.made.remove(machine)
    host.end.write_text("unheard")
    hypervisor = QemuHypervisor(reactor, warm=False)
    found = await hypervisor.adopt(vms.spec("box")).addTimeout(DEADLINE, reactor)
    assert (found is not None) == keeps
    if found is not None:
        assert vms.keep(found).accelerator == TCG
        assert state_of(found) is MachineState.CRASHED
    assert (await vms.make("next", warm=False, hypervisor=hypervisor)).accelerator == TCG


@ensureDeferred
async def test_on_the_guest_of_another(vms: Vms, host: Kvm) -> None:
    """What was kept with KVM goes on with it: emulated it cannot, and on this guest KVM did not give up."""
    machine = await vms.running("box")
    await machine.save_state()
    await machine.leave()
    vms.made.remove(machine)
    hypervisor = QemuHypervisor(reactor, warm=False)
    hypervisor._gave_up(WORDS)
    found = await QemuHypervisor(reactor, warm=False).adopt(vms.spec("box")).addTimeout(DEADLINE, reactor)
    assert found is not None
    assert vms.keep(found).accelerator == KVM
    await found.start().addTimeout(DEADLINE, reactor)
    assert state_of(found) is MachineState.RUNNING
    host.device.unlink()
    await found.save_state()
    await found.leave()
    vms.made.clear()
    found = await QemuHypervisor(reactor, warm=False).adopt(vms.spec("box")).addTimeout(DEADLINE, reactor)
    assert found is not None
    assert vms.keep(found).accelerator == TCG
    with pytest.raises(HypervisorError, match="cannot go back to saved: it ran with KVM then"):
        await found.start()


class KvmJob(CheckpointedJob):
    """A job on such a host."""

    def start(self) -> None:
        code = (
            "import sys; from pathlib import Path; from host_agent.wrapper.main import build_wrapper; "
            "from host_agent.wrapper.options import Options; "
            f"build_wrapper(Options(), Path.cwd(), [sys.executable, {str(HERE / 'kvm_host.py')!r}]).run()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code], cwd=self.slot, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
        )


@pytest.fixture
def job(host: Kvm, image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("VMWRAPPER_IMAGES", str(tmp_path / "images"))
    monkeypatch.setenv("VMWRAPPER_WARM_START", "0")
    shutil.copytree(image.directory, tmp_path / "images" / image.name)
    made = KvmJob(tmp_path / "slot", count=24, period=2.0)
    made.prepare()
    yield made
    made.end()


def test_on_the_guest_of_a_job(job: KvmJob, host: Kvm) -> None:
    """Which has checkpoints, but all of them need KVM: its task begins anew, emulated, and that is all."""
    job.start()
    job.until(lambda: job.checkpoints > 0 and job.lines > 3)
    assert "box is starting: with KVM" in job.log
    host.end.touch()
    job.finish()
    assert job.problems() == []
    log = job.log
    assert log.count(f"The VM box ended unexpectedly: {SENTENCE}") == 1
    assert log.count("beginning it anew in a new virtual machine, this once") == 1
    assert log.count("box is starting:") == 2
    assert f"box is starting: {REMARK}" in log
    assert log.count("vmwrapper 0") == 1, "there was no temporary exit"
    agent_log = (job.slot / "host-agent.log").read_text()
    assert agent_log.count(f"it gave up on a guest: {WORDS}; VMs run emulated from now on") == 1


def test_a_job_was_saved_with_a_kvm_that_is_gone(job: KvmJob, host: Kvm) -> None:
    job.start()
    job.until(lambda: job.lines > 3)
    assert job.process is not None
    job.process.terminate()
    assert job.process.wait(60) == 0
    assert "is saved, and goes on at the next start" in job.log
    host.device.unlink()
    job.start()
    job.finish()
    assert job.problems() == []
    assert "cannot go back to saved: it ran with KVM then, and this host runs it emulated now" in job.log
    assert job.log.count("beginning it anew in a new virtual machine, this once") == 1
    assert job.log.count("vmwrapper 0") == 2, "there was no temporary exit"
