"""The QEMU driver on Windows, without a QEMU: `python -m tests.windows.check_qemu DIR`.

Its lines are connected to by this process itself, and what it starts as QEMU is another Python.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import attrs
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import deferLater, react
from twisted.python.failure import Failure

from host_agent.hypervisors import qemu_options
from host_agent.hypervisors.base import MachineSpec
from host_agent.hypervisors.images import NO_IMAGE
from host_agent.hypervisors.leash import CONSOLE
from host_agent.hypervisors.qemu import QemuHypervisor
from host_agent.hypervisors.qemu_child import QemuChild
from host_agent.hypervisors.qemu_process import HowItEnded
from host_agent.hypervisors.qemu_wiring import HOST_LINE, MONITOR, LoopbackWiring, wiring

PORT = 61613
DEADLINE = 60.0


class Hello(Protocol):
    def connectionMade(self) -> None:
        assert self.transport is not None
        self.transport.write(b"hello")
        self.transport.loseConnection()


class Heard(Protocol):
    def __init__(self) -> None:
        self.data = b""
        self.ended: Deferred[bytes] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        self.data += data

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.ended.callback(self.data)


async def lines_and_words(directory: Path) -> None:
    services = {PORT: Factory.forProtocol(Hello)}
    made = wiring(_reactor, directory, services, os.getpid)
    assert isinstance(made, LoopbackWiring)
    made.open()
    lines: list[Any] = [made.listen(line, Factory.forProtocol(Hello)) for line in (MONITOR, HOST_LINE)]
    for line in lines:
        heard = await connectProtocol(TCP4ClientEndpoint(_reactor, "127.0.0.1", line.getHost().port), Heard())
        assert await heard.ended.addTimeout(DEADLINE, _reactor) == b"hello"
    print("ok: both lines are ports of the loopback interface", flush=True)
    image = attrs.evolve(NO_IMAGE, kernel=directory / "kernel", cmdline="quiet", disk=directory / "base")
    spec = MachineSpec("box", "i-1", image, directory, 256, 1, services, b"{}", lambda state, reason: None)
    for name in ("qemu-system-x86_64.exe", "qemu-img.exe"):
        (directory / "qemu").mkdir(exist_ok=True)
        (directory / "qemu" / name).touch()
    os.environ["PROGRAMFILES"] = str(directory)
    config = directory / "a, b.json"
    argv = qemu_options.command_line(spec, qemu_options.TCG, directory / "disk.qcow2", made.wires(), config)
    assert Path(argv[0]) == directory / "qemu" / "qemu-system-x86_64.exe", argv[0]
    assert f"socket,id=monitor,host=127.0.0.1,port={lines[0].getHost().port},server=off" in argv
    assert f"name=opt/vmwrapper/config,file={directory}\\a,, b.json" in argv
    assert "-sandbox" not in argv
    print("ok: QEMU is found where its installer puts it, and its command line is Windows'", flush=True)
    for line in lines:
        await line.stopListening()
    await made.close()


async def a_child(directory: Path) -> None:
    told: Deferred[HowItEnded] = Deferred()
    child = QemuChild(_reactor, directory, told.callback)
    code = "import sys\nprint('the console', flush=True)\nsys.stderr.write('no such disk')\nsys.exit(3)"
    await child.start([sys.executable, "-c", code], directory, 0.0)
    how = await told.addTimeout(DEADLINE, _reactor)
    assert str(how) == "QEMU ended with status 3: no such disk", how
    assert (directory / CONSOLE).read_bytes().strip() == b"the console"
    assert child.pid is None
    assert not await child.reattach()
    print("ok: what it says and how it ends is told", flush=True)
    told = Deferred()
    child = QemuChild(_reactor, directory, told.callback)
    code = "n = 0\nwhile True:\n    n += 1\n    print('again', n, flush=True)"
    await child.start([sys.executable, "-c", code], directory, 0.0)
    child.share(0.5)
    await grows(directory / CONSOLE)
    child.share(1.0)
    await grows(directory / CONSOLE)
    child.kill()
    await told.addTimeout(DEADLINE, _reactor)
    print("ok: held to a share it goes on, and it is ended", flush=True)


async def grows(path: Path) -> None:
    """The last lines change; the file itself has a bounded size."""
    before = path.read_bytes()[-100:]
    for _ in range(600):
        await deferLater(_reactor, 0.1)  # nothing says that a file has grown
        if path.read_bytes()[-100:] != before:
            return
    raise AssertionError("it stands still")


async def check(directory: Path) -> None:
    driver = QemuHypervisor(_reactor)
    assert driver.guest_gateway == "10.0.2.2"
    assert not (driver.capabilities.adopt or driver.capabilities.save_state or driver.capabilities.clone_from_template)
    missing = (await driver.requirements())[0]
    assert not missing.met
    assert "qemu.org" in missing.remedy
    print(f"ok: {missing.name}: {missing.found}; {missing.remedy}", flush=True)
    await lines_and_words(directory)
    await a_child(directory)


def main(reactor: Any) -> Deferred[None]:
    return Deferred.fromCoroutine(check(Path(sys.argv[1])))


if __name__ == "__main__":
    assert os.name == "nt", "this is for Windows"
    react(main)
