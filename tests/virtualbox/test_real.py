"""The driver over a real VirtualBox: the contract, the whole life of a VM, and what a crash leaves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import psutil
import pytest
import pytest_twisted
from pytest_twisted import ensureDeferred
from twisted.internet import reactor as _reactor
from twisted.internet.defer import gatherResults
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import deferLater

from host_agent.hypervisors.base import Hypervisor, HypervisorError, Machine, MachineSpec, MachineState
from host_agent.hypervisors.images import Image
from host_agent.hypervisors.virtualbox.driver import VirtualBoxHypervisor
from host_agent.ledger import sweep
from tests.contract.hypervisor_contract import HypervisorContract, Told

from . import guest

SETTINGS = b'{"passcode": "only this guest may know"}'
reactor: Any = _reactor


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """An image whose guest prints letters."""
    return guest.image(tmp_path_factory.mktemp("tiny") / "image")


class TestVirtualBox(HypervisorContract):
    @pytest.fixture(autouse=True)
    def _driver(self) -> Iterator[None]:
        self.driver = VirtualBoxHypervisor(reactor)
        yield
        pytest_twisted.blockon(self.driver.close())

    def hypervisor(self) -> Hypervisor:
        return self.driver

    def image(self, request: pytest.FixtureRequest) -> Image:
        found: Image = request.getfixturevalue("tiny")
        return found


@pytest.fixture
def driver() -> Iterator[VirtualBoxHypervisor]:
    made = VirtualBoxHypervisor(reactor)
    yield made
    pytest_twisted.blockon(made.close())


def spec_for(image: Image, directory: Path, name: str = "real", told: Told | None = None) -> MachineSpec:
    directory.mkdir(mode=0o700, parents=True)
    services = {61613: Factory.forProtocol(Protocol)}
    instance = f"t-{directory.name}-{directory.parent.name}"[-40:]
    return MachineSpec(name, instance, image, directory, 64, 1, services, SETTINGS, told or Told())


async def printed(machine: Machine, more_than: str, text: str = "") -> str:
    """The console once it shows more than before (and `text`)."""
    for _ in range(300):
        console = machine.console_tail(100)
        if len(console) > len(more_than) and text in console:
            return console
        await deferLater(reactor, 0.1)
    raise AssertionError(f"the console stays …{machine.console_tail()[-300:]!r}")


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        await deferLater(reactor, 0.1)
    raise AssertionError("this did not happen within 60 s")


def manage(*arguments: str) -> str:
    """What VBoxManage says: another client of the same VirtualBox."""
    done = subprocess.run(["VBoxManage", *arguments], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def nothing_is_left() -> None:
    for what in ("vms", "runningvms", "hdds", "dvds"):
        assert manage("list", what).strip() == "", what


@ensureDeferred
async def test_console_and_saved_state(driver: VirtualBoxHypervisor, tiny: Image, tmp_path: Path) -> None:
    machine = await driver.create(spec_for(tiny, tmp_path / "vm"))
    try:
        await machine.start()
        before = await printed(machine, "", "GUEST\nabc")
        await machine.save_state()
        assert not psutil.pid_exists(machine.pid or 0) or machine.pid is None
        await machine.start()
        after = await printed(machine, before + "..")
        # The same guest, in memory where it was: it goes on with the next letter and greets nobody again.
        assert after.count("VMWRAPPER TEST GUEST") == 1
        assert after.startswith(before)
        assert (machine.spec.directory / "console.log").stat().st_mode & 0o077 == 0
    finally:
        await machine.destroy()
    nothing_is_left()


@ensureDeferred
async def test_restored_guest_goes_back(driver: VirtualBoxHypervisor, tiny: Image, tmp_path: Path) -> None:
    machine = await driver.create(spec_for(tiny, tmp_path / "vm"))
    try:
        await machine.start()
        early = await printed(machine, "", "ab")
        await machine.snapshot("early", lambda: None)
        late = await printed(machine, early, "abcdefgh")
        await machine.restore("early")
        again = await printed(machine, late + "..")
        letters = again.rpartition("\n")[2]
        assert letters[letters.index("h") + 1 :].lstrip("ijklmno")[:1] in set("abcd"), letters
    finally:
        await machine.destroy()
    nothing_is_left()


@ensureDeferred
async def test_guest_that_powers_itself_off(driver: VirtualBoxHypervisor, tmp_path: Path) -> None:
    told = Told()
    image = guest.image(tmp_path / "image", guest.POWERS_OFF)
    machine = await driver.create(spec_for(image, tmp_path / "vm", told=told))
    try:
        await machine.start()
        await until(lambda: machine.state is MachineState.STOPPED)
        assert told.reasons[-1] == "the guest powered itself off"
        assert "VMWRAPPER TEST GUEST" in machine.console_tail()
    finally:
        await machine.destroy()


@ensureDeferred
async def test_killed_process_is_a_crash(driver: VirtualBoxHypervisor, tiny: Image, tmp_path: Path) -> None:
    told = Told()
    machine = await driver.create(spec_for(tiny, tmp_path / "vm", told=told))
    try:
        await machine.start()
        os.kill(machine.pid or 0, signal.SIGKILL)
        await until(lambda: machine.state is MachineState.CRASHED)
        assert "ended unexpectedly" in told.reasons[-1]
    finally:
        await machine.destroy()
    nothing_is_left()


@ensureDeferred
async def test_service_that_is_killed(driver: VirtualBoxHypervisor, tiny: Image, tmp_path: Path) -> None:
    told = Told()
    machine = await driver.create(spec_for(tiny, tmp_path / "vm", told=told))
    try:
        await machine.start()
        # VirtualBox's service belongs to this test run alone; its VMs end with it.
        for process in psutil.process_iter(["name"]):
            if process.info["name"] == "VBoxSVC":
                process.kill()
        await until(lambda: machine.state not in (MachineState.RUNNING, MachineState.STARTING))
        assert machine.state is MachineState.CRASHED
        assert "service ended" in told.reasons[-1]
    finally:
        await machine.destroy()
    nothing_is_left()


@ensureDeferred
async def test_two_machines_share_an_image(driver: VirtualBoxHypervisor, tiny: Image, tmp_path: Path) -> None:
    machines = [await driver.create(spec_for(tiny, tmp_path / f"vm{n}", f"twin {n}")) for n in (1, 2)]
    before = tiny.disk.read_bytes()
    try:
        await gatherResults([machine.start() for machine in machines])
        for machine in machines:
            await printed(machine, "", "abc")
        await machines[0].destroy()
        await printed(machines[1], machines[1].console_tail(100))
        info = manage("showvminfo", machines[1].id, "--machinereadable")  # type: ignore[attr-defined]
        for line in ('nic1="nat"', 'uart1="0x03f8,4"', "cpuexecutioncap=100", "vram=16", "memory=64"):
            assert line in info
    finally:
        for machine in machines:
            await machine.destroy()
    nothing_is_left()
    assert tiny.disk.read_bytes() == before


@ensureDeferred
async def test_image_as_vmdk_and_as_ova(
    driver: VirtualBoxHypervisor, tiny: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMWRAPPER_IMAGES", str(tmp_path / "store"))
    vmdk, ova = tmp_path / "disk.vmdk", tmp_path / "box.ova"
    manage("clonemedium", str(tiny.disk), str(vmdk), "--format", "VMDK")
    manage("createvm", "--name", "exported", "--register", "--basefolder", str(tmp_path / "exported"))
    manage("storagectl", "exported", "--name", "IDE", "--add", "ide")
    manage(
        *("storageattach", "exported", "--storagectl", "IDE", "--port", "0", "--device", "0"),
        *("--type", "hdd", "--medium", str(vmdk)),
    )
    manage("export", "exported", "--output", str(ova))
    manage("unregistervm", "exported")
    for disk in (vmdk, tiny.disk):
        manage("closemedium", "disk", str(disk))
    for turn, disk in enumerate((vmdk, ova, ova)):
        machine = await driver.create(spec_for(attrs.evolve(tiny, disk=disk), tmp_path / f"vm{turn}"))
        try:
            await machine.start()
            await printed(machine, "", "TEST GUEST")
        finally:
            await machine.destroy()
    assert len(list((tmp_path / "store" / ".virtualbox").iterdir())) == 1
    nothing_is_left()


@ensureDeferred
async def test_image_of_another_hypervisor_is_refused(
    driver: VirtualBoxHypervisor, tiny: Image, tmp_path: Path
) -> None:
    for image in (attrs.evolve(tiny, kernel=tmp_path), attrs.evolve(tiny, disk=tmp_path / "disk.qcow2")):
        with pytest.raises(HypervisorError, match="VirtualBox cannot") as caught:
            await driver.create(spec_for(image, tmp_path / f"vm-{image.disk.suffix[1:]}"))
        assert "boot loader" in caught.value.hint


def test_what_a_killed_host_agent_leaves_is_removed(
    tiny: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VM, disks and registration, when nobody has taken it over; a machine that is not ours stays."""
    manage("createvm", "--name", "theirs", "--register", "--basefolder", str(tmp_path / "theirs"))
    directory = tmp_path / "vm-crash"
    directory.mkdir(mode=0o700)
    program = [sys.executable, "-m", "tests.virtualbox.dying_agent", str(tiny.directory), str(directory)]
    with subprocess.Popen(program, stdout=subprocess.PIPE) as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline() == b"running\n"
        agent.kill()
    try:
        listed = subprocess.run(
            [sys.executable, "-m", "host_agent.vmctl.main", "vms"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        assert re.search(r"^crash \S+ +running +left behind", listed, re.M), listed
        assert re.search(r"^theirs +poweredoff +not ours", listed, re.M), listed
        (sentence,) = sweep()
        assert re.match(r"left the VM \S+ to the next host agent", sentence)
        assert sweep() == []
        assert directory.exists()
        assert "crash" in manage("list", "runningvms")
        monkeypatch.setenv("VMWRAPPER_GRACE", "0")  # its time is over
        sentences = sweep()
        assert any("removed the VM" in sentence for sentence in sentences), sentences
        assert not directory.exists()
        assert [line.split()[0] for line in manage("list", "vms").splitlines()] == ['"theirs"']
        assert manage("list", "hdds").strip() == manage("list", "runningvms").strip() == ""
        assert sweep() == []
    finally:
        manage("unregistervm", "theirs", "--delete")


def test_doctor_says_what_is_missing(tmp_path: Path) -> None:
    """In the chroot that is the kernel driver."""
    done = subprocess.run(
        [sys.executable, "-m", "host_agent.vmctl.main", "doctor", "--hypervisor", "virtualbox"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert re.search(r"^ok +VirtualBox +7\.2\.", done.stdout, re.M), done.stdout + done.stderr
    assert re.search(r"^ok +pyvbox +works", done.stdout, re.M)
    if not Path("/dev/vboxdrv").exists():
        assert re.search(r"^FAIL +VirtualBox driver +/dev/vboxdrv is not there", done.stdout, re.M)
        assert done.returncode == 1
