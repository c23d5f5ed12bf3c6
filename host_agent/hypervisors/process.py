"""The guest agent as an ordinary process of this host: no virtual machine and no isolation.

For trying things out (`vmctl` against an agent on a laptop) and for tests of everything but virtual hardware. As a
guest's process 1 would, it starts an agent that ends again; `reboot` ends everything in the guest but its disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import psutil
from twisted.internet.defer import Deferred, fail, gatherResults, succeed
from twisted.internet.interfaces import IListeningPort, IProcessTransport
from twisted.internet.protocol import ProcessProtocol
from twisted.protocols.policies import WrappingFactory
from twisted.python.failure import Failure

from common.config import GuestConfig
from common.files import write_private
from host_agent.ledger import LedgerEntry

from .base import Capabilities, HypervisorError, Machine, MachineSpec, MachineState, Requirement
from .cpu_time import CpuTime
from .process_watch import watch_process

LOOPBACK = "127.0.0.1"
ROOT = Path(__file__).resolve().parents[2]  # where the packages are
END_DEADLINE = 10.0  # seconds that an agent may take to end
MOST_RESTARTS = 1000  # of an agent that ends by itself


class ProcessHypervisor:
    """Starts guest agents as processes."""

    name = "process"
    capabilities = Capabilities(adopt=True)
    guest_gateway = LOOPBACK

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor

    def requirements(self) -> Deferred[list[Requirement]]:
        return succeed([Requirement("python", True, sys.executable)])

    def create(self, spec: MachineSpec) -> Deferred[Machine]:
        return succeed(ProcessMachine(self._reactor, spec, LedgerEntry(spec.instance, spec.directory)))

    def adopt(self, spec: MachineSpec) -> Deferred[Machine | None]:
        try:
            value = json.loads((spec.directory / "process.json").read_bytes())
            pid, created, places = value["pid"], value["created"], value["places"]
            alive = abs(psutil.Process(pid).create_time() - created) < 1.0
        except (OSError, ValueError, KeyError, psutil.Error):
            alive = False
        if not alive:
            LedgerEntry(spec.instance, spec.directory).close()
            return succeed(None)
        machine = ProcessMachine(self._reactor, spec, LedgerEntry(spec.instance, spec.directory))
        machine.take_over(pid, {int(seen): int(real) for seen, real in places.items()})
        return succeed(machine)


class ProcessMachine(ProcessProtocol):
    """One guest agent process; the service ports that it gets are free ports of the loopback interface."""

    def __init__(self, reactor: Any, spec: MachineSpec, ledger: LedgerEntry) -> None:
        self.spec = spec
        self.state = MachineState.DEFINED
        self.pid: int | None = None
        self._reactor = reactor
        self._ledger = ledger
        self._process: IProcessTransport | None = None
        self._ports: list[IListeningPort] = []
        self._places: dict[int, int] = {}  # ports: as guests elsewhere see them, and here
        self._cpu_time = CpuTime()
        self._ended: list[Deferred[None]] = []
        self._connections: list[_CountedFactory] = []
        self._restarts = 0
        self._unwatch: Callable[[], None] = lambda: None

    @property
    def home(self) -> Path:
        """The guest's home directory."""
        return self.spec.directory / "home"

    def start(self) -> Deferred[None]:
        self.home.mkdir(exist_ok=True)
        self._listen(dict.fromkeys(self.spec.services, 0))
        write_private(self.spec.directory / "config.json", self._config())
        self._spawn()
        self._change(MachineState.RUNNING, "")
        return succeed(None)

    def _listen(self, places: dict[int, int]) -> None:
        for port, factory in self.spec.services.items():
            counted = _CountedFactory(factory)
            self._connections.append(counted)
            listening = self._reactor.listenTCP(places[port], counted, interface=LOOPBACK)
            self._ports.append(listening)
            self._places[port] = listening.getHost().port

    def take_over(self, pid: int, places: dict[int, int]) -> None:
        """Go on with the process of an earlier host agent."""
        self._listen(places)
        self._has_process(pid)
        self._unwatch = watch_process(self._reactor, pid, lambda: self._gone("it has ended"))
        status = psutil.Process(pid).status()
        self.state = MachineState.PAUSED if status == psutil.STATUS_STOPPED else MachineState.RUNNING

    def _has_process(self, pid: int) -> None:
        self.pid = pid
        self._ledger.has_process(pid)
        value = {"pid": pid, "created": psutil.Process(pid).create_time(), "places": self._places}
        write_private(self.spec.directory / "process.json", json.dumps(value).encode("ascii"))

    def _spawn(self) -> None:
        config = self.spec.directory / "config.json"
        argv = [sys.executable, "-m", "guest_agent", "--config", str(config), "--home", str(self.home)]
        env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(self.home)}
        # Its console is a file: it has to be written to when this host agent is no more.
        with (self.spec.directory / "console.log").open("ab") as console, Path(os.devnull).open("rb") as nothing:
            places = {0: nothing.fileno(), 1: console.fileno(), 2: console.fileno()}
            self._process = self._reactor.spawnProcess(
                self, argv[0], argv, env=env, path=str(self.home), childFDs=places
            )
        pid: int | None = getattr(self._process, "pid", None)
        assert pid is not None
        self._has_process(pid)

    def _config(self) -> bytes:
        """The guest's settings, with our real ports in place of those that guests of other hypervisors see."""
        asked = self.spec.directory / "config.asked"
        write_private(asked, self.spec.guest_config)
        config = GuestConfig.load(asked)
        brokers = tuple(attrs.evolve(broker, port=self._places[broker.port]) for broker in config.brokers)
        files = re.sub(r"(?<=:)\d+$", lambda seen: str(self._places[int(seen[0])]), config.files)
        return attrs.evolve(config, brokers=brokers, files=files).to_json()

    def _change(self, state: MachineState, reason: str) -> None:
        if state is not self.state:
            self.state = state
            self.spec.on_state(state, reason)

    # -- for tests of what goes wrong

    def restart_agent(self) -> None:
        """Kill the agent alone; it is started again, as the guest's process 1 does."""
        self._signal("KILL")

    def reboot(self) -> None:
        """Kill everything in the guest at once, as a reset does; its disk stays, and it boots again."""
        for process in self._guest_processes():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def crash(self) -> None:
        """End for good, without having been asked."""
        self._restarts = MOST_RESTARTS
        self.reboot()

    def cut_connections(self) -> None:
        """Break every connection between the agent and its host."""
        for factory in self._connections:
            factory.cut()

    def _guest_processes(self) -> list[psutil.Process]:
        """The agent, its keeper, and the programs that the keeper started."""
        found = []
        for process in psutil.process_iter(["cmdline", "pid"]):
            if process.info["pid"] == self.pid or str(self.home) in (process.info["cmdline"] or []):
                with contextlib.suppress(psutil.Error):
                    found += [process, *process.children(recursive=True)]
        return found

    # -- ProcessProtocol

    def processEnded(self, reason: Failure) -> None:
        self._gone(reason.getErrorMessage())

    def _gone(self, reason: str) -> None:
        self._process, self.pid = None, None
        self._unwatch = lambda: None
        asked = bool(self._ended)
        if not asked and self._restarts < MOST_RESTARTS:
            self._restarts += 1
            self._spawn()
            return
        self._change(MachineState.STOPPED if asked else MachineState.CRASHED, "" if asked else reason)
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
        if self.pid is None:
            return succeed(None)
        waiter: Deferred[None] = Deferred()
        self._ended.append(waiter)
        self._signal("CONT")
        self._signal("TERM")
        kill = self._reactor.callLater(END_DEADLINE, self._kill_all)

        def gone(result: None) -> None:
            if kill.active():
                kill.cancel()

        return waiter.addCallback(gone)

    def _kill_all(self) -> None:
        for process in self._guest_processes():
            with contextlib.suppress(psutil.Error):
                process.kill()

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
        self._unwatch()
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

    def _cannot(self, what: str) -> Deferred[Any]:
        return fail(HypervisorError(f"{self.spec.name} is an ordinary process: it cannot {what}"))

    def _signal(self, name: str) -> None:
        if self.pid is None:
            return
        self._cpu_time.look(self.pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, int(getattr(signal, f"SIG{name}")))

    def cpu_seconds(self) -> float:
        return self._cpu_time.look(self.pid)

    def console_tail(self, lines: int = 20) -> str:
        try:
            text = (self.spec.directory / "console.log").read_text("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])


class _CountedFactory(WrappingFactory):
    """Knows its connections."""

    noisy = False

    def cut(self) -> None:
        for protocol in list(self.protocols):
            protocol.transport.abortConnection()
