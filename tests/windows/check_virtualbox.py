"""The VirtualBox driver on Windows, over the stand-in of VirtualBox: `python -m tests.windows.check_virtualbox DIR`.

What runs here is ours and pywin32's: the driver, its worker process with pipes, pyvbox's library, errors of COM. Of
VirtualBox itself there is nothing, and of COM nothing but its errors: no class of it is registered here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import react

from host_agent.hypervisors.base import HypervisorError, MachineSpec, MachineState
from host_agent.hypervisors.images import Image
from host_agent.hypervisors.virtualbox import pyvbox
from host_agent.hypervisors.virtualbox.driver import VirtualBoxHypervisor

ROOT = Path(__file__).resolve().parents[2]
FAKE = ROOT / "tests" / "virtualbox" / "fake"
TOLD = (0, "SessionMachine", "The machine is locked", None, 0, -2135228409)


async def check(directory: Path) -> None:
    environment = {**os.environ, "VBOX_SDK_PATH": str(FAKE), "FAKE_VIRTUALBOX": "7.2"}
    environment["PYTHONPATH"] = os.pathsep.join([str(FAKE), str(ROOT)])
    driver = VirtualBoxHypervisor(_reactor, environment)
    found = {each.name: each for each in await driver.requirements()}
    assert found["VirtualBox"].met, found["VirtualBox"].found
    print("ok: the worker runs, and answers", flush=True)
    disk = directory / "disk.vdi"
    disk.write_bytes(b"disk")
    image = Image("fake", directory, "0" * 64, "x86_64", disk, None, None, "", 256)
    own = directory / "vm-box"
    own.mkdir()
    told: list[MachineState] = []
    services = {61613: Factory.forProtocol(Protocol)}
    spec = MachineSpec("box", "i-1", image, own, 256, 1, services, b"{}", lambda state, _: told.append(state))
    machine = await driver.create(spec)
    for step in (machine.start, machine.pause, machine.resume, machine.save_state, machine.start, machine.power_off):
        await step()
    assert told[-1] is MachineState.STOPPED, told
    assert {MachineState.RUNNING, MachineState.PAUSED, MachineState.SAVED} <= set(told), told
    print("ok: a machine was made, ran, stood still, was saved, went on and was ended", flush=True)
    try:
        await machine.restore("nothing")
        raise AssertionError("it went back to a snapshot that there is not")
    except HypervisorError as error:
        print(f"ok: {error}", flush=True)
    await machine.destroy()
    await driver.close()
    assert not own.exists()
    print("ok: nothing is left of it", flush=True)


def check_com() -> None:
    import pywintypes  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import win32com.client  # type: ignore[import-not-found, import-untyped, unused-ignore]

    error = pywintypes.com_error(-2147352567, "Exception occurred.", TOLD, None)
    assert pyvbox.words(error) == "The machine is locked"
    assert pyvbox.status(error) == 0x80BB0007
    try:
        win32com.client.Dispatch("VirtualBox.VirtualBox")
        raise AssertionError("there is a VirtualBox here")
    except pywintypes.com_error as error:
        assert pyvbox.words(error)
        print(f"ok: COM says: {pyvbox.words(error)}", flush=True)


def main(reactor: Any) -> Deferred[None]:
    check_com()
    return Deferred.fromCoroutine(check(Path(sys.argv[1])))


if __name__ == "__main__":
    assert os.name == "nt", "this is for Windows"
    react(main)
