"""How a QEMU and its host agent reach each other.

On Unix: Unix sockets in a private directory, and descriptors that QEMU hands over (`guest_ports.py`). Windows has no
such thing: there the same lines go over ports of the loopback interface, to which this QEMU's own process alone is let,
and the guest finds its services at its network's gateway, as with VirtualBox (`loopback_ports.py`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import attrs
import psutil
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, IListeningPort, IProtocol, IProtocolFactory
from twisted.logger import Logger
from zope.interface import implementer

from .guest_ports import GuestPorts
from .loopback_ports import LOOPBACK, ServicePorts, tell_guest
from .qemu_process import HowItEnded, QemuProcess
from .qemu_words import value

WINDOWS = os.name == "nt"
CLOSED_GATEWAY = "10.0.2.100"  # not the network's own gateway, which would be the host's loopback
NAT_GATEWAY = "10.0.2.2"
MONITOR = "qmp"
HOST_LINE = "host"
LOOKS = 3  # into a table of connections that is read in pieces while it changes: a row may be left out


class Process(Protocol):
    """One QEMU process; `QemuProcess` says what each of these does."""

    pid: int | None
    leash_pid: int | None

    def start(self, argv: list[str], directory: Path, grace: float) -> Deferred[None]: ...
    def reattach(self) -> Deferred[bool]: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def share(self, share: float) -> None: ...
    def let_go(self) -> None: ...


def new_process(reactor: Any, place: Path, on_end: Callable[[HowItEnded], None]) -> Process:
    """That of this system."""
    if WINDOWS:
        from .qemu_child import QemuChild

        return QemuChild(reactor, place, on_end)
    return QemuProcess(reactor, place, on_end)


def gateway() -> str:
    """Where guests of this system's QEMU see their services."""
    return NAT_GATEWAY if WINDOWS else CLOSED_GATEWAY


@attrs.frozen
class Wires:
    """What QEMU is told of all this: where two lines lead, and the rest of its `-netdev user`."""

    monitor: str
    host: str
    network: str


class Wiring(Protocol):
    """The lines of one VM."""

    def open(self) -> None:
        """Listen for what the guest connects to; before QEMU is started."""

    def listen(self, line: str, factory: IProtocolFactory) -> IListeningPort:
        """Listen for QEMU itself; also before."""

    def wires(self) -> Wires: ...

    def settings(self, told: bytes) -> bytes:
        """A guest's settings, with the places where it finds its services."""

    def close(self) -> Deferred[None]:
        """The guest's ports."""


def wiring(
    reactor: Any, place: Path, services: Mapping[int, IProtocolFactory], pid: Callable[[], int | None]
) -> Wiring:
    """That of this system. `place` is the VM's private directory, `pid` tells which process is its QEMU."""
    return LoopbackWiring(reactor, services, pid) if WINDOWS else UnixWiring(reactor, place, services)


class UnixWiring:
    """Everything in a directory that is the owner's alone, and a guest that reaches nothing but its ports."""

    def __init__(self, reactor: Any, place: Path, services: Mapping[int, IProtocolFactory]) -> None:
        self._reactor = reactor
        self._place = place
        self._ports = GuestPorts(reactor, place, services)

    def open(self) -> None:
        self._ports.open()

    def listen(self, line: str, factory: IProtocolFactory) -> IListeningPort:
        path = self._path(line)
        path.unlink(missing_ok=True)  # an agent that was killed left its own
        listening: IListeningPort = self._reactor.listenUNIX(str(path), factory, mode=stat.S_IRUSR | stat.S_IWUSR)
        return listening

    def _path(self, line: str) -> Path:
        return self._place / f"{line}.sock"

    def wires(self) -> Wires:
        # QEMU outlives its host agent, and connects to the next one.
        monitor, host = (f"path={value(self._path(line))},server=off,reconnect=1" for line in (MONITOR, HOST_LINE))
        forwards = self._ports.forwards(CLOSED_GATEWAY)
        return Wires(monitor, host, ",".join(["restrict=on", *([forwards] if forwards else [])]))

    def settings(self, told: bytes) -> bytes:
        return told

    def close(self) -> Deferred[None]:
        return self._ports.close()


class LoopbackWiring:
    """Ports of the loopback interface. QEMU ends with its host agent here, so it connects once."""

    def __init__(self, reactor: Any, services: Mapping[int, IProtocolFactory], pid: Callable[[], int | None]) -> None:
        self._reactor = reactor
        self._pid = pid
        guarded = {port: OneProcessOnly(factory, pid) for port, factory in services.items()}
        self._ports = ServicePorts(reactor, guarded)
        self._lines: dict[str, int] = {}

    def open(self) -> None:
        self._ports.open()

    def listen(self, line: str, factory: IProtocolFactory) -> IListeningPort:
        guarded = OneProcessOnly(factory, self._pid)
        listening: Any = self._reactor.listenTCP(0, guarded, interface=LOOPBACK)
        self._lines[line] = listening.getHost().port
        port: IListeningPort = listening
        return port

    def wires(self) -> Wires:
        monitor, host = (f"host={LOOPBACK},port={self._lines[line]},server=off" for line in (MONITOR, HOST_LINE))
        return Wires(monitor, host, "restrict=off")

    def settings(self, told: bytes) -> bytes:
        return tell_guest(told, NAT_GATEWAY, NAT_GATEWAY, self._ports.places)

    def close(self) -> Deferred[None]:
        return self._ports.close()


@implementer(IProtocolFactory)
class OneProcessOnly:
    """Passes the connections of one process on to a factory, and drops others: any user here can try a port."""

    _log = Logger()

    def __init__(self, factory: IProtocolFactory, pid: Callable[[], int | None]) -> None:
        self._factory = factory
        self._pid = pid

    def doStart(self) -> None:
        self._factory.doStart()

    def doStop(self) -> None:
        self._factory.doStop()

    def buildProtocol(self, addr: IAddress) -> IProtocol | None:
        port = int(getattr(addr, "port", 0))
        if _owner(port) not in (0, self._pid() or -1):
            self._log.warn("a connection from port {port} is not of the VM's own process: refused", port=port)
            return None
        return self._factory.buildProtocol(addr)


def _owner(port: int) -> int | None:
    """The process at the other end of a connection of the loopback interface; 0 where the system does not say (wine),
    None when there is no such connection."""
    for _ in range(LOOKS):
        for each in psutil.net_connections("tcp4"):
            here = each.laddr and (each.laddr.ip, each.laddr.port) == (LOOPBACK, port)
            if here and each.status == psutil.CONN_ESTABLISHED:
                return each.pid or 0
    return None
