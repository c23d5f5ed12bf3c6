"""The guest agent as an ordinary process of this host: no virtual machine and no isolation.

For trying things out (`vmctl` against an agent on a laptop) and for tests of everything but virtual hardware.
"""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, gatherResults, succeed
from twisted.internet.interfaces import IListeningPort, IProcessTransport
from twisted.internet.protocol import ProcessProtocol
from twisted.protocols.policies import WrappingFactory
from twisted.python.failure import Failure

from common.config import GuestConfig
from common.files import write_private

from .base import Capabilities, HypervisorError, Machine, MachineSpec, MachineState, Requirement
from .cpu_time import CpuTime

LOOPBACK = "127.0.0.1"
ROOT = Path(__file__).resolve().parents[2]  # where the packages are
CONSOLE_BYTES = 64 * 1024
END_DEADLINE = 10.0  # seconds that an agent may take to end


class ProcessHypervisor:
    """Starts guest agents as children of this process."""

    name = "process"
    capabilities = Capabilities()
    guest_gateway = LOOPBACK

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor

    def requirements(self) -> Deferred[list[Requirement]]:
        return succeed([Requirement("python", True, sys.executable)])

    def create(self, spec: MachineSpec) -> Deferred[Machine]:
        return succeed(ProcessMachine(self._reactor, spec))


class ProcessMachine(ProcessProtocol):
    """One guest agent process; the service ports that it gets are free ports of the loopback interface."""

    def __init__(self, reactor: Any, spec: MachineSpec) -> None:
        self.spec = spec
        self.state = MachineState.DEFINED
        self._reactor = reactor
        self._process: IProcessTransport | None = None
        self._ports: list[IListeningPort] = []
        self._console = bytearray()
        self._cpu_time = CpuTime()
        self._ended: list[Deferred[None]] = []
        self._connections: list[_CountedFactory] = []
        self._restarting = False

    @property
    def home(self) -> Path:
        """The guest's home directory."""
        return self.spec.directory / "home"

    @property
    def pid(self) -> int | None:
        pid: int | None = getattr(self._process, "pid", None)
        return pid

    def start(self) -> Deferred[None]:
        self.home.mkdir(exist_ok=True)
        places: dict[int, int] = {}
        for port, factory in self.spec.services.items():
            counted = _CountedFactory(factory)
            self._connections.append(counted)
            listening = self._reactor.listenTCP(0, counted, interface=LOOPBACK)
            self._ports.append(listening)
            places[port] = listening.getHost().port
        config = self.spec.directory / "config.json"
        write_private(config, self._config(places))
        self._spawn()
        self._change(MachineState.RUNNING, "")
        return succeed(None)

    def _spawn(self) -> None:
        config = self.spec.directory / "config.json"
        argv = [sys.executable, "-m", "guest_agent", "--config", str(config), "--home", str(self.home)]
        env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(self.home)}
        self._process = self._reactor.spawnProcess(self, argv[0], argv, env=env, path=str(self.home))

    def _config(self, places: dict[int, int]) -> bytes:
        text = self.spec.guest_config.decode("utf-8")
        for seen, real in places.items():  # ports as guests of other hypervisors see them
            text = text.replace(str(seen), str(real))
        path = self.spec.directory / "config.asked"
        write_private(path, text.encode("utf-8"))
        return GuestConfig.load(path).to_json()

    def _change(self, state: MachineState, reason: str) -> None:
        if state is not self.state:
            self.state = state
            self.spec.on_state(state, reason)

    # -- for tests of what goes wrong

    def restart_agent(self) -> None:
        """Kill the agent alone, and start it again, as the guest's process 1 does."""
        self._restarting = True
        self._signal("KILL")

    def cut_connections(self) -> None:
        """Break every connection between the agent and its host."""
        for factory in self._connections:
            factory.cut()

    # -- ProcessProtocol

    def outReceived(self, data: bytes) -> None:
        self._console += data
        del self._console[:-CONSOLE_BYTES]

    errReceived = outReceived

    def processEnded(self, reason: Failure) -> None:
        self._process = None
        if self._restarting:
            self._restarting = False
            self._spawn()
            return
        asked = bool(self._ended)
        self._change(MachineState.STOPPED if asked else MachineState.CRASHED, "" if asked else reason.getErrorMessage())
        waiters, self._ended = self._ended, []
        for waiter in waiters:
            waiter.callback(None)

    # -- Machine

    def pause(self) -> Deferred[None]:
        self._signal("STOP")
        self._change(MachineState.PAUSED, "")
        return succeed(None)

    def resume(self) -> Deferred[None]:
        self._signal("CONT")
        self._change(MachineState.RUNNING, "")
        return succeed(None)

    def power_off(self) -> Deferred[None]:
        if self._process is None:
            return succeed(None)
        waiter: Deferred[None] = Deferred()
        self._ended.append(waiter)
        self._signal("CONT")
        self._signal("TERM")
        kill = self._reactor.callLater(END_DEADLINE, self._signal, "KILL")

        def gone(result: None) -> None:
            if kill.active():
                kill.cancel()

        return waiter.addCallback(gone)

    def destroy(self) -> Deferred[None]:
        def clean(_: object) -> Deferred[None]:
            ports, self._ports = self._ports, []
            closed = [port.stopListening() or succeed(None) for port in ports]
            shutil.rmtree(self.spec.directory, ignore_errors=True)
            self._change(MachineState.DESTROYED, "")
            return gatherResults(closed).addCallback(lambda _: None)

        return self.power_off().addCallback(clean)

    def _signal(self, name: str) -> None:
        if self._process is None:
            return
        try:
            self._cpu_time.look(self.pid)
            self._process.signalProcess(int(getattr(signal, f"SIG{name}")))
        except Exception as error:
            raise HypervisorError(f"{self.spec.name}: the agent's process took no signal: {error!r}") from None

    def cpu_seconds(self) -> float:
        return self._cpu_time.look(self.pid)

    def console_tail(self, lines: int = 20) -> str:
        return "\n".join(self._console.decode("utf-8", "replace").splitlines()[-lines:])


class _CountedFactory(WrappingFactory):
    """Knows its connections."""

    noisy = False

    def cut(self) -> None:
        for protocol in list(self.protocols):
            protocol.transport.abortConnection()
