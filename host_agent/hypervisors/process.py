"""The guest agent as an ordinary process of this host: no virtual machine and no isolation.

For trying things out (`vmctl` against an agent on a laptop) and for tests of everything but virtual hardware. It
stands on a leash as a VM does: a process 1 (`process_init.py`) starts the agent, and again whenever it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakSet

import psutil
from twisted.internet.defer import Deferred, fail, gatherResults, succeed
from twisted.internet.interfaces import IAddress, IListeningPort, IProtocol, IProtocolFactory
from zope.interface import implementer

from common.files import write_private
from host_agent.ledger import LedgerEntry

from .base import Capabilities, Door, HypervisorError, Machine, MachineSpec, MachineState, Requirement
from .cpu_time import CpuTime
from .leash import CONSOLE
from .loopback_ports import LOOPBACK, listen_again, tell_guest
from .qemu_process import HowItEnded
from .qemu_process import QemuProcess as LeashedProcess

ROOT = Path(__file__).resolve().parents[2]  # where the packages are
INIT = Path(__file__).with_name("process_init.py")
PLACES = "places.json"
AGENT = "VMWRAPPER_GUEST_AGENT"  # another agent than that of this checkout, as a command line: its one-file form
GRACE = 60.0  # seconds that a guest goes on without a host agent
END_DEADLINE = 15.0  # seconds that an agent may take to end


class ProcessHypervisor:
    """Starts guest agents as processes."""

    name = "process"
    # What a power cut leaves of its home is never used again: a guest that nobody can take over is removed.
    capabilities = Capabilities(image=False, adopt=True, boots_again=False)
    guest_gateway = LOOPBACK

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor

    def requirements(self) -> Deferred[list[Requirement]]:
        return succeed([Requirement("python", True, sys.executable)])

    def create(self, spec: MachineSpec) -> Deferred[Machine]:
        return succeed(ProcessMachine(self._reactor, spec, LedgerEntry(spec.instance, spec.directory)))

    def adopt(self, spec: MachineSpec) -> Deferred[Machine | None]:
        return Deferred.fromCoroutine(self._adopt(spec))

    async def _adopt(self, spec: MachineSpec) -> Machine | None:
        ledger = LedgerEntry(spec.instance, spec.directory)
        machine = ProcessMachine(self._reactor, spec, ledger)
        if await machine.take_over():
            return machine
        ledger.close()
        shutil.rmtree(spec.directory, ignore_errors=True)
        return None


class ProcessMachine:
    """A guest's process 1 on its leash; the service ports that it gets are free ports of the loopback interface."""

    def __init__(self, reactor: Any, spec: MachineSpec, ledger: LedgerEntry) -> None:
        self.spec = spec
        self.state = MachineState.DEFINED
        self._reactor = reactor
        self._ledger = ledger
        self._process = LeashedProcess(reactor, ledger.path, self._ended)
        self._ports: list[IListeningPort] = []
        self._places: dict[int, int] = {}  # ports: as guests elsewhere see them, and here
        self._cpu_time = CpuTime()
        self._gone: list[Deferred[None]] = []
        self._connections: list[_Connections] = []

    @property
    def home(self) -> Path:
        """The guest's home directory."""
        return self.spec.directory / "home"

    @staticmethod
    def shown(path: Path) -> str:
        """A path as the agent's system writes it."""
        return str(path)

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def start(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._start())

    async def _start(self) -> None:
        self.home.mkdir(exist_ok=True)
        for port, factory in self.spec.services.items():
            self._listens(port, self._reactor.listenTCP(0, self._counted(factory), interface=LOOPBACK))
        config = self.spec.directory / "config.json"
        write_private(config, tell_guest(self.spec.guest_config, LOOPBACK, LOOPBACK, self._places))
        write_private(self.spec.directory / PLACES, json.dumps(self._places).encode("ascii"))
        program = shlex.split(os.environ.get(AGENT, "")) or [sys.executable, "-m", "guest_agent"]
        agent = [*program, "--config", self.shown(config), "--home", self.shown(self.home)]
        if setpriv := shutil.which("setpriv"):
            agent = [setpriv, "--pdeathsig", "KILL", "--", *agent]  # when the leash gives its process 1 up
        env = ["/usr/bin/env", "-i", "PATH=/usr/local/bin:/usr/bin:/bin", f"PYTHONPATH={ROOT}", f"HOME={self.home}"]
        argv = [*env, sys.executable, "-I", "-S", str(INIT), *agent]
        await self._process.start(argv, self.spec.directory, GRACE)
        self._note_process()
        self._change(MachineState.RUNNING, "")

    def _note_process(self) -> None:
        if self._process.pid is not None and self._process.leash_pid is not None:
            self._ledger.has_process(self._process.pid, self._process.leash_pid)

    def _counted(self, factory: IProtocolFactory) -> _Connections:
        self._connections.append(_Connections(factory))
        return self._connections[-1]

    def _listens(self, port: int, listening: Any) -> None:
        self._ports.append(listening)
        self._places[port] = listening.getHost().port

    async def take_over(self) -> bool:
        """Go on with the process of an earlier host agent; False when it has ended."""
        if not await self._process.reattach() or self._process.pid is None:
            return False
        try:
            stopped = psutil.Process(self._process.pid).status() == psutil.STATUS_STOPPED
        except psutil.Error:  # it has ended just now
            self._process.let_go()
            return False
        places = json.loads((self.spec.directory / PLACES).read_bytes())
        for port, factory in self.spec.services.items():
            self._listens(port, await listen_again(self._reactor, places[str(port)], self._counted(factory)))
        self._note_process()
        self.state = MachineState.PAUSED if stopped else MachineState.RUNNING
        return True

    def _change(self, state: MachineState, reason: str) -> None:
        if state is not self.state:
            self.state = state
            self.spec.on_state(state, reason)

    def _ended(self, how: HowItEnded) -> None:
        asked = bool(self._gone)
        self._change(MachineState.STOPPED if asked else MachineState.CRASHED, "" if asked else "its process 1 ended")
        gone, self._gone = self._gone, []
        for waiter in gone:
            waiter.callback(None)

    # -- for tests of what goes wrong

    def guest_processes(self) -> dict[str, list[psutil.Process]]:
        """What runs in the guest: its `agent`, its `keeper`, and the `programs` that the keeper started."""
        found: dict[str, list[psutil.Process]] = {"agent": [], "keeper": [], "programs": []}
        for process in psutil.process_iter(["cmdline", "ppid"]):
            if str(self.home) in (process.info["cmdline"] or []) and process.pid != self.pid:
                kind = "agent" if process.info["ppid"] == self.pid else "keeper"
                found[kind].append(process)
                if kind == "keeper":
                    with contextlib.suppress(psutil.Error):
                        found["programs"] += process.children(recursive=True)
        return found

    def restart_agent(self) -> None:
        """Kill the agent alone; it is started again."""
        for process in self.guest_processes()["agent"]:
            process.kill()

    def cut_connections(self) -> None:
        """Break every connection between the agent and its host."""
        for connections in self._connections:
            connections.cut()

    # -- Machine

    def pause(self) -> Deferred[None]:
        self._signal_all(signal.SIGSTOP)
        self._change(MachineState.PAUSED, "")
        return succeed(None)

    def resume(self) -> Deferred[None]:
        self._signal_all(signal.SIGCONT)
        self._change(MachineState.RUNNING, "")
        return succeed(None)

    def _signal_all(self, number: signal.Signals) -> None:
        self._cpu_time.look(self.pid)
        self._process.signal(number)
        for processes in self.guest_processes().values():
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)

    def limit(self, cpu_share: float) -> None:
        pass

    def power_off(self) -> Deferred[None]:
        if self.pid is None:
            return succeed(None)
        waiter: Deferred[None] = Deferred()
        self._gone.append(waiter)
        self._signal_all(signal.SIGCONT)
        self._process.signal(signal.SIGTERM)
        kill = self._reactor.callLater(END_DEADLINE, self._signal_all, signal.SIGKILL)

        def gone(result: None) -> None:
            if kill.active():
                kill.cancel()

        return waiter.addCallback(gone)

    def destroy(self) -> Deferred[None]:
        def clean(_: object) -> Deferred[None]:
            closed = self._close_ports()
            shutil.rmtree(self.spec.directory, ignore_errors=True)
            self._ledger.close()
            self._change(MachineState.DESTROYED, "")
            return closed

        return self.power_off().addCallback(clean)

    def _close_ports(self) -> Deferred[None]:
        ports, self._ports = self._ports, []
        closed = [port.stopListening() or succeed(None) for port in ports]
        return gatherResults(closed).addCallback(lambda _: None)

    def leave(self) -> Deferred[None]:
        self._process.let_go()
        self.cut_connections()
        return self._close_ports()

    def save_state(self) -> Deferred[None]:
        return self._cannot("save its state")

    def snapshot(self, name: str, paused: Callable[[], None]) -> Deferred[None]:
        return self._cannot("make snapshots")

    def restore(self, name: str) -> Deferred[None]:
        return self._cannot("make snapshots")

    def snapshots(self) -> Deferred[list[str]]:
        return succeed([])

    def delete_snapshot(self, name: str) -> Deferred[None]:
        return self._cannot("make snapshots")

    def reach(self, port: int) -> Deferred[Door]:
        return succeed(Door(LOOPBACK, port, lambda: succeed(None)))

    def _cannot(self, what: str) -> Deferred[Any]:
        return fail(HypervisorError(f"{self.spec.name} is an ordinary process: it cannot {what}"))

    def cpu_seconds(self) -> float:
        return self._cpu_time.look(self.pid)

    def screen(self, path: Path) -> Deferred[bool]:
        return succeed(False)

    def console_tail(self, lines: int = 20) -> str:
        try:
            text = (self.spec.directory / CONSOLE).read_text("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])


@implementer(IProtocolFactory)
class _Connections:
    """Those of one port, so that they can be broken.

    Without Twisted's wrapper around each: the broker writes to plain sockets itself, to others a turn later.
    """

    def __init__(self, factory: IProtocolFactory) -> None:
        self._factory = factory
        self._protocols: WeakSet[Any] = WeakSet()

    def doStart(self) -> None:
        self._factory.doStart()

    def doStop(self) -> None:
        self._factory.doStop()

    def buildProtocol(self, addr: IAddress) -> IProtocol | None:
        protocol = self._factory.buildProtocol(addr)
        if protocol is not None:
            self._protocols.add(protocol)
        return protocol

    def cut(self) -> None:
        for protocol in list(self._protocols):
            if protocol.transport is not None:
                protocol.transport.abortConnection()
