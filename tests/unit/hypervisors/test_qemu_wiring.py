"""How QEMU is told to reach its host agent, on each system; and who else is let in."""

from __future__ import annotations

import importlib
import os
import platform
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol

from common.broker_address import BrokerAddress, Credentials
from common.config import GuestConfig
from host_agent.hypervisors import qemu_options, qemu_wiring
from host_agent.hypervisors.base import MachineSpec
from host_agent.hypervisors.images import NO_IMAGE
from host_agent.hypervisors.qemu_wiring import HOST_LINE, MONITOR, LoopbackWiring, UnixWiring, Wiring

reactor: Any = _reactor
DEADLINE = 30.0
PORT = 61613


class Greeting(Protocol):
    def connectionMade(self) -> None:
        assert self.transport is not None
        self.transport.write(b"hello")
        self.transport.loseConnection()


def services() -> dict[int, Factory]:
    return {PORT: Factory.forProtocol(Greeting)}


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Any]]:
    """`qemu_options` as it is on another system."""

    def on(system: str, machine: str) -> Any:
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(platform, "machine", lambda: machine)
        return importlib.reload(qemu_options)

    yield on
    monkeypatch.undo()
    importlib.reload(qemu_options)


def spec(directory: Path) -> MachineSpec:
    image = attrs.evolve(
        NO_IMAGE, kernel=Path("/kernel"), initrd=Path("/initrd"), cmdline="quiet", disk=Path("/base"), memory_mb=256
    )
    return MachineSpec("box", "i-1", image, directory, 256, 1, services(), b"{}", lambda state, reason: None)


def words(options: Any, wiring: Wiring, directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(options, "program", lambda name: name)
    accelerator = options.HARDWARE
    argv: list[str] = options.command_line(spec(directory), accelerator, directory / "disk.qcow2", wiring.wires(), None)
    return argv


def of(argv: list[str], option: str) -> list[str]:
    return [argv[index + 1] for index, word in enumerate(argv) if word == option]


@ensureDeferred
async def test_on_windows_lines_are_ports_and_the_guest_finds_its_services_at_the_gateway(
    tmp_path: Path, options: Callable[[str, str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wiring = LoopbackWiring(reactor, services(), lambda: None)
    wiring.open()
    lines = [wiring.listen(line, Factory.forProtocol(Protocol)) for line in (MONITOR, HOST_LINE)]
    try:
        monitor, host = (port.getHost().port for port in lines)  # type: ignore[attr-defined]
        module = options("win32", "AMD64")
        argv = words(module, wiring, tmp_path, monkeypatch)
        assert argv[0] == "qemu-system-x86_64"  # no nice, setpriv or prlimit before it
        assert of(argv, "-accel") == ["whpx,kernel-irqchip=off"]
        assert of(argv, "-chardev") == [
            f"socket,id=monitor,host=127.0.0.1,port={monitor},server=off",
            "stdio,id=console,signal=off",
            f"socket,id=host,host=127.0.0.1,port={host},server=off",
        ]
        assert of(argv, "-netdev") == ["user,id=net,ipv6=off,restrict=off"]
        assert "-sandbox" not in argv
        config = GuestConfig("g", "h", "box", (BrokerAddress("10.0.2.2", PORT),), Credentials("l", "p"), "", "s")
        (tmp_path / "told").write_bytes(wiring.settings(config.to_json()))
        [broker] = GuestConfig.load(tmp_path / "told").brokers
        assert broker.host == "10.0.2.2"
        assert broker.port not in (PORT, monitor, host)
        assert "qemu.org" in module.REMEDY
    finally:
        for port in lines:
            port.stopListening()
        await wiring.close()


@ensureDeferred
async def test_on_unix_lines_are_sockets_and_the_guest_reaches_nothing_else(
    tmp_path: Path, options: Callable[[str, str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wiring = UnixWiring(reactor, tmp_path, services())
    wiring.open()
    try:
        for system, machine, accelerator in (("linux", "x86_64", "kvm"), ("darwin", "arm64", "hvf")):
            argv = words(options(system, machine), wiring, tmp_path, monkeypatch)
            assert of(argv, "-accel") == [accelerator]
            assert of(argv, "-chardev")[0] == f"socket,id=monitor,path={tmp_path}/qmp.sock,server=off,reconnect=1"
            assert of(argv, "-netdev")[0].startswith(
                f"user,id=net,ipv6=off,restrict=on,guestfwd=tcp:10.0.2.100:{PORT}-cmd:"
            )
            assert ("-sandbox" in argv) == (system == "linux")
            if system == "darwin":
                assert argv[0] == "qemu-system-aarch64"
        assert wiring.settings(b"{}") == b"{}"
    finally:
        await wiring.close()


def test_windows_finds_qemu_where_its_installer_puts_it(
    tmp_path: Path, options: Callable[[str, str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "qemu").mkdir()
    program = tmp_path / "qemu" / "qemu-img.EXE"
    program.write_bytes(b"")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PROGRAMFILES", str(tmp_path))
    monkeypatch.setenv("PATHEXT", ".EXE")
    assert options("win32", "AMD64").find_program("qemu-img") == str(program)
    assert options("linux", "x86_64").find_program("qemu-img") is None


@pytest.mark.parametrize("whose", ["the VM's", "another's", "nobody's"])
@ensureDeferred
async def test_only_the_vm_s_own_process_is_let_in(whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process stands for QEMU, or for somebody else."""
    pid = {"the VM's": os.getpid(), "another's": 1, "nobody's": None}[whose]
    wiring = LoopbackWiring(reactor, services(), lambda: pid)
    listening: Any = wiring.listen(MONITOR, services()[PORT])
    heard: Deferred[bytes] = Deferred()

    def connect() -> None:
        with socket.create_connection(("127.0.0.1", listening.getHost().port), timeout=DEADLINE) as ours:
            try:
                data = ours.recv(10)
            except ConnectionResetError:
                data = b""
            reactor.callFromThread(heard.callback, data)

    reactor.callInThread(connect)
    try:
        assert await heard.addTimeout(DEADLINE, reactor) == (b"hello" if whose == "the VM's" else b"")
    finally:
        await listening.stopListening()


def test_the_choice_is_the_system_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(qemu_wiring.wiring(reactor, tmp_path, {}, lambda: None), UnixWiring)
    assert qemu_wiring.gateway() == "10.0.2.100"
    monkeypatch.setattr(qemu_wiring, "WINDOWS", True)
    assert isinstance(qemu_wiring.wiring(reactor, tmp_path, {}, lambda: None), LoopbackWiring)
    assert qemu_wiring.gateway() == "10.0.2.2"
    assert type(qemu_wiring.new_process(reactor, tmp_path, lambda how: None)).__name__ == "QemuChild"
