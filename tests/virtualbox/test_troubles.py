"""What goes wrong between the driver and VirtualBox: hangs, crashes, failures with VirtualBox's own words."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import pytest_twisted
from pytest_twisted import ensureDeferred
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import LoopingCall, deferLater

from host_agent.hypervisors.base import HypervisorError, MachineSpec, MachineState
from host_agent.hypervisors.virtualbox import driver as driver_module
from host_agent.hypervisors.virtualbox.calls import Calls
from host_agent.hypervisors.virtualbox.driver import VirtualBoxHypervisor
from host_agent.hypervisors.virtualbox.record import Record
from tests.contract.hypervisor_contract import Told, state_of

from .test_fake import bootable_image, environment

reactor: Any = _reactor
DEADLINE = 30.0
Make = Callable[..., VirtualBoxHypervisor]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[VirtualBoxHypervisor] = []

    def hypervisor(version: str = "7.2", **more: str) -> VirtualBoxHypervisor:
        made.append(VirtualBoxHypervisor(reactor, environment(version, **more)))
        return made[-1]

    yield hypervisor
    pytest_twisted.blockon(gatherResults([each.close() for each in made]))


@pytest.fixture
def spec(tmp_path: Path) -> MachineSpec:
    directory = tmp_path / "vm"
    directory.mkdir(mode=0o700)
    instance = f"t-{os.getpid()}-{tmp_path.name}"
    return MachineSpec("box", instance, bootable_image(tmp_path), directory, 128, 1, {}, b"{}", Told())


def told(spec: MachineSpec) -> Told:
    found: Any = spec.on_state
    assert isinstance(found, Told)
    return found


async def until(condition: Callable[[], bool]) -> None:
    """Bounded wait for what no event tells."""
    done: Deferred[None] = Deferred()

    def look() -> None:
        if condition() and not done.called:
            done.callback(None)

    call = LoopingCall(look)
    call.start(0.02)
    try:
        await done.addTimeout(DEADLINE, reactor)
    finally:
        call.stop()


@pytest.mark.parametrize("method", ["createMachine", "launchVMProcess", "pause", "lockMachine"])
@ensureDeferred
async def test_call_that_hangs_ends_at_its_deadline(
    make: Make, spec: MachineSpec, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from host_agent.hypervisors.virtualbox import machine as module

    for name in ("SHORT", "CREATE_DEADLINE", "START_DEADLINE", "END_DEADLINE", "STATE_DEADLINE"):
        monkeypatch.setattr(module, name, 2.0)
    hypervisor = make(FAKE_VIRTUALBOX_HANGS=method)
    ticks: list[float] = []
    alive = LoopingCall(lambda: ticks.append(reactor.seconds()))
    alive.start(0.05)
    try:
        with pytest.raises(HypervisorError, match="did not answer within 2 s"):
            machine = await hypervisor.create(spec)
            await machine.start()
            await machine.pause()
    finally:
        alive.stop()
    # The reactor went on all the time.
    assert max(later - before for before, later in itertools.pairwise(ticks)) < 1.0


@ensureDeferred
async def test_next_call_after_a_hang_has_a_new_worker(make: Make) -> None:
    hypervisor = make(FAKE_VIRTUALBOX_HANGS="pause")
    await hypervisor.machines()
    first = hypervisor.calls.pid
    with pytest.raises(HypervisorError, match="did not answer"):
        await hypervisor.calls.call("machines", 0.0)
    assert await hypervisor.machines() == []
    assert hypervisor.calls.pid not in (None, first)


@ensureDeferred
async def test_worker_that_is_killed_fails_its_calls_and_is_replaced(make: Make, spec: MachineSpec) -> None:
    hypervisor = make(FAKE_VIRTUALBOX_HANGS="createMachine")
    waiting = hypervisor.create(spec)
    await until(lambda: hypervisor.calls.pid is not None)
    await deferLater(reactor, 0.5)
    os.kill(hypervisor.calls.pid or 0, signal.SIGKILL)
    with pytest.raises(HypervisorError, match="the process for VirtualBox has ended"):
        await waiting.addTimeout(DEADLINE, reactor)
    assert not spec.directory.exists()
    assert await hypervisor.machines() == []


@ensureDeferred
async def test_failed_progress_raises_with_virtualbox_s_words(make: Make, spec: MachineSpec) -> None:
    text = "The virtual machine 'box' has terminated unexpectedly (VERR_VM_DRIVER_NOT_INSTALLED)"
    hypervisor = make(FAKE_VIRTUALBOX_FAILS=f"launchVMProcess={text}")
    machine = await hypervisor.create(spec)
    try:
        with pytest.raises(HypervisorError, match="kernel driver is not loaded") as caught:
            await machine.start()
        assert text in str(caught.value)
        assert "vboxconfig" in caught.value.hint
        assert state_of(machine) is MachineState.CRASHED
        assert text in told(spec).reasons[-1]
    finally:
        await machine.destroy()


@ensureDeferred
async def test_create_that_fails_leaves_nothing(make: Make, spec: MachineSpec) -> None:
    hypervisor = make(FAKE_VIRTUALBOX_FAILS="createDiffStorage=VERR_DISK_FULL")
    with pytest.raises(HypervisorError, match="the disk of this host is full"):
        await hypervisor.create(spec)
    assert not spec.directory.exists()
    assert await hypervisor.machines() == []
    assert spec.image.disk.exists()


@ensureDeferred
async def test_process_that_dies_is_a_crash(make: Make, spec: MachineSpec) -> None:
    hypervisor = make()
    machine = await hypervisor.create(spec)
    try:
        await machine.start()
        assert machine.pid is not None
        os.kill(machine.pid, signal.SIGKILL)
        await until(lambda: machine.state is MachineState.CRASHED)
        assert "ended unexpectedly" in told(spec).reasons[-1]
        assert machine.pid is None
    finally:
        await machine.destroy()


@ensureDeferred
async def test_several_machines_do_not_wait_for_each_other(make: Make, tmp_path: Path) -> None:
    hypervisor = make()
    machines = []
    for number in range(4):
        place = tmp_path / str(number)
        (place / "vm").mkdir(parents=True)
        image = bootable_image(place)
        instance = f"t-{os.getpid()}-several-{number}"
        spec = MachineSpec(f"box {number}", instance, image, place / "vm", 64, 1, {}, b"{}", Told())
        machines.append(await hypervisor.create(spec))
    await gatherResults([machine.start() for machine in machines])
    assert {state_of(machine) for machine in machines} == {MachineState.RUNNING}
    assert len({machine.pid for machine in machines}) == 4
    assert len(await hypervisor.machines()) == 4
    await gatherResults([machine.destroy() for machine in machines])
    assert await hypervisor.machines() == []


@ensureDeferred
async def test_machines_of_others_are_listed_and_not_ours(make: Make, tmp_path: Path) -> None:
    hypervisor = make(FAKE_VIRTUALBOX_FOREIGN=str(tmp_path))
    theirs, lost = await hypervisor.machines()
    assert (theirs["name"], theirs["instance"], theirs["state"]) == ("theirs", "", "PoweredOff")
    assert lost["state"] == "Inaccessible"


@pytest.mark.parametrize(
    ("version", "sentence", "hint"),
    [
        ("broken", "cannot be loaded", "bindings"),
        ("0.0", "its service cannot be reached.*Failed to start VBoxSVC", "VBoxManage"),
    ],
)
@ensureDeferred
async def test_broken_virtualbox_has_its_own_sentence(make: Make, version: str, sentence: str, hint: str) -> None:
    hypervisor = make(version)
    with pytest.raises(HypervisorError, match=sentence) as caught:
        await hypervisor.machines()
    assert hint in caught.value.hint
    found = (await hypervisor.requirements())[0]
    assert (found.name, found.met, found.fatal) == ("VirtualBox", False, True)


@ensureDeferred
async def test_missing_bindings_have_their_own_sentence(tmp_path: Path) -> None:
    calls = Calls(reactor, {**os.environ, "VBOX_SDK_PATH": str(tmp_path)})
    try:
        with pytest.raises(HypervisorError, match=r"vboxapi\) were not found") as caught:
            await calls.call("hello", DEADLINE)
        assert "VBOX_SDK_PATH" in caught.value.hint
    finally:
        await calls.close()


@ensureDeferred
async def test_missing_pyvbox_has_its_own_sentence(tmp_path: Path) -> None:
    (tmp_path / "virtualbox.py").write_text("raise ImportError('not here')")
    paths = os.pathsep.join([str(tmp_path), environment("7.2")["PYTHONPATH"]])
    calls = Calls(reactor, environment("7.2", PYTHONPATH=paths))
    try:
        with pytest.raises(HypervisorError, match="pyvbox's library is missing") as caught:
            await calls.call("hello", DEADLINE)
        assert "pip install virtualbox==2.1.1" in caught.value.hint
    finally:
        await calls.close()


def test_driver_is_what_the_option_names() -> None:
    from host_agent.hypervisors.choice import make_hypervisor

    assert isinstance(make_hypervisor("virtualbox", reactor), driver_module.VirtualBoxHypervisor)


def test_sweep_keeps_what_can_be_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from host_agent import ledger

    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))
    asked: list[str] = []

    def unregister(hypervisor: str, machine: str, directory: Path) -> str:
        asked.append(machine)
        return ""

    monkeypatch.setattr(ledger, "_unregister", unregister)
    directory = tmp_path / "vm-saved"
    saved = directory / "machine" / "Snapshots" / "2026.sav"
    saved.parent.mkdir(parents=True)
    saved.touch()
    entry = ledger.LedgerEntry("g-saved", directory)
    entry.has_machine("virtualbox", "UUID")
    monkeypatch.setattr(ledger, "is_alive", lambda identity: False)
    monkeypatch.setenv("VMWRAPPER_GRACE", "0")
    assert ledger.sweep() == [f"kept {directory}: its VM can be restored"]
    assert saved.exists()
    assert not asked
    # Its slot is gone: nobody can restore it any more.
    shutil.rmtree(directory)
    assert "removed the VM g-saved from virtualbox" in ledger.sweep()
    assert asked == ["UUID"]
    assert ledger.sweep() == []


@ensureDeferred
async def test_services_of_a_host_only_guest_listen_on_that_network(make: Make, spec: MachineSpec) -> None:
    spec = attrs.evolve(
        spec,
        services={61613: Factory.forProtocol(Protocol)},
        guest_config=b'{"brokers": [{"host": "10.0.2.2", "port": 61613}], "passcode": "only for this guest"}',
    )
    with pytest.raises(HypervisorError, match="no host-only interface vboxnet9") as caught:
        await make(VMWRAPPER_VIRTUALBOX_NETWORK="hostonly:vboxnet9").create(spec)
    assert "hostonlyif create" in caught.value.hint
    machine = await make(VMWRAPPER_VIRTUALBOX_NETWORK="hostonly:vboxnet0").create(spec)
    try:
        record = Record.read(spec.directory)
        assert record is not None
        assert record.address == "127.0.0.2"
        iso = spec.directory / "config.iso"
        assert f'{{"host": "127.0.0.2", "port": {record.ports[61613]}}}'.encode() in iso.read_bytes()
        assert iso.stat().st_mode & 0o777 == 0o600
        endpoint = TCP4ClientEndpoint(reactor, "127.0.0.2", record.ports[61613])
        connected: Any = await endpoint.connect(Factory.forProtocol(Protocol))
        connected.transport.loseConnection()
    finally:
        await machine.destroy()
