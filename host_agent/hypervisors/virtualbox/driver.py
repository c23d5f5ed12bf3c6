"""The VirtualBox driver. Everything that reaches VirtualBox goes through `calls.py`, each call with a deadline."""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import psutil
from twisted.internet.defer import Deferred, DeferredLock, fail, succeed
from twisted.logger import Logger

from common.files import write_private
from host_agent.ledger import LedgerEntry

from ..base import Capabilities, HypervisorError, Machine, MachineSpec, MachineState, Requirement
from ..cpu_time import CpuTime
from .calls import Calls
from .config_iso import config_iso
from .console import Console
from .images import BaseDisks
from .requirements import requirements
from .service_ports import ServicePorts, tell_guest
from .settings import Settings

GATEWAY = "10.0.2.2"  # of VirtualBox's NAT

SHORT = 60.0  # seconds for a call that looks or switches
CREATE_DEADLINE = 120.0
START_DEADLINE = 180.0  # restoring a saved state reads all of the guest's memory
STATE_DEADLINE = 660.0  # for what writes memory or merges disks; the worker gives up before, with the better words
END_DEADLINE = 120.0  # power off, with its second way

# What VirtualBox's names of states mean here; those that are left out pass by themselves.
STATES = {
    "PoweredOff": MachineState.STOPPED,
    "Aborted": MachineState.CRASHED,
    "Stuck": MachineState.CRASHED,
    "Gone": MachineState.CRASHED,
    "Running": MachineState.RUNNING,
    "Paused": MachineState.PAUSED,
}
REASONS = {
    "PoweredOff": "the guest powered itself off",
    "Aborted": "VirtualBox's process of the VM ended unexpectedly",
    "Stuck": "VirtualBox stopped the guest after a fatal error of its processor",
    "Gone": "VirtualBox does not know the VM any more",
}
_ALIVE = (MachineState.STARTING, MachineState.RUNNING, MachineState.PAUSED)


class VirtualBoxHypervisor:
    """VirtualBox as it is installed on this host, as this user."""

    name = "virtualbox"
    capabilities = Capabilities()
    guest_gateway = GATEWAY

    def __init__(self, reactor: Any, environment: Mapping[str, str] | None = None) -> None:
        self._reactor = reactor
        self.calls = Calls(reactor, environment)
        self._settings = Settings.from_environment(os.environ if environment is None else environment)
        self._disks = BaseDisks(self.calls)

    def requirements(self) -> Deferred[list[Requirement]]:
        return Deferred.fromCoroutine(requirements(self.calls))

    def machines(self) -> Deferred[list[dict[str, Any]]]:
        """Every machine that VirtualBox has for this user, ours or not (`Box.machines`)."""
        return self.calls.call("machines", SHORT)

    def close(self) -> Deferred[None]:
        """Let go of VirtualBox."""
        return self.calls.close()

    def create(self, spec: MachineSpec) -> Deferred[Machine]:
        return Deferred.fromCoroutine(self._create(spec))

    def adopt(self, spec: MachineSpec) -> Deferred[Machine | None]:
        return succeed(None)

    async def _create(self, spec: MachineSpec) -> Machine:
        base = await self._disks.disk_of(spec.image)
        identity = str(uuid.uuid4())
        ledger = LedgerEntry(spec.instance, spec.directory)
        machine = VirtualBoxMachine(self._reactor, self.calls, spec, ledger, identity)
        try:
            ledger.has_machine(self.name, identity)
            await machine.make(str(base), self._settings)
        except BaseException:
            await machine.destroy()
            raise
        return machine


class VirtualBoxMachine:
    """One VM. Operations of one VM wait for each other; those of several do not."""

    _log = Logger()

    def __init__(self, reactor: Any, calls: Calls, spec: MachineSpec, ledger: LedgerEntry, identity: str) -> None:
        self.spec = spec
        self.id = identity  # VirtualBox's UUID of it
        self.state = MachineState.DEFINED
        self.pid: int | None = None
        self._calls = calls
        self._ledger = ledger
        self._ports = ServicePorts(reactor, spec.services)
        self._console_socket = ledger.path / "console.sock"
        self._console = Console(reactor, self._console_socket, spec.directory / "console.log")
        self._one = DeferredLock()
        self._news_passed_by = False
        self._cpu_time = CpuTime()
        self._cpu_before = 0.0  # seconds, of processes that carried this VM earlier

    # -- making

    async def make(self, base: str, settings: Settings) -> None:
        """Register it with VirtualBox, its disk a difference over `base`."""
        spec = self.spec
        self._ports.open()
        told = tell_guest(spec.guest_config, GATEWAY, GATEWAY, self._ports.places)
        iso = spec.directory / "config.iso"
        write_private(iso, config_iso(told))
        await self._calls.call(
            "create",
            CREATE_DEADLINE,
            machine=self.id,
            name=f"{spec.name} {spec.instance}",
            instance=spec.instance,
            settings=str(spec.directory / "machine" / "machine.vbox"),
            base=base,
            disk=str(spec.directory / "disk.vdi"),
            iso=str(iso),
            console=str(self._console_socket),
            memory_mb=spec.memory_mb,
            cpus=spec.cpus,
            cpu_cap=settings.cpu_cap,
            network=settings.network,
        )

    # -- states

    def _change(self, state: MachineState, reason: str = "") -> None:
        if state not in _ALIVE:
            self._process_ended()
        if state is not self.state:
            self.state = state
            self.spec.on_state(state, reason)

    def _process_ended(self) -> None:
        if self.pid is not None:
            self._cpu_time.look(self.pid)
            self._cpu_before += self._cpu_time.seconds
            self._cpu_time = CpuTime()
            self.pid = None

    def _news(self, name: str, pid: int | None) -> None:
        """What VirtualBox says of this VM, asked or not."""
        if self._one.locked:
            self._news_passed_by = True  # an operation is about to say where it led
            return
        state = STATES.get(name)
        if state is None or self.state not in _ALIVE:
            return
        self._change(state, REASONS.get(name, ""))
        if name == "Stuck":
            self.power_off().addErrback(lambda failure: self._log.warn("{why}", why=failure.getErrorMessage()))

    def _alone(self, operation: Callable[[], Awaitable[Any]]) -> Deferred[Any]:
        """Run an operation when those before it have ended."""

        async def run() -> Any:
            await self._one.acquire()
            try:
                return await operation()
            finally:
                self._one.release()
                if self._news_passed_by and self.state in _ALIVE:
                    self._news_passed_by = False
                    self._calls.watch(self.id, self._news)  # hears the present state again

        return Deferred.fromCoroutine(run())

    async def _ask(self, call: str, deadline: float, **arguments: Any) -> Any:
        try:
            return await self._calls.call(call, deadline, machine=self.id, **arguments)
        except HypervisorError as error:
            raise HypervisorError(f"the VM {self.spec.name}: {error}", error.hint) from None

    # -- start and end

    def start(self) -> Deferred[None]:
        return self._alone(self._start)

    async def _start(self) -> None:
        if self.state is MachineState.RUNNING:
            return
        if self.state in (MachineState.PAUSED, MachineState.DESTROYED):
            raise HypervisorError(f"{self.spec.name} is {self.state.value} and cannot be started")
        self._change(MachineState.STARTING)
        try:
            answer = await self._ask("start", START_DEADLINE)
        except HypervisorError as error:
            sentence = f"the VM {self.spec.name} did not start: {str(error).partition(': ')[2]}"
            self._change(MachineState.CRASHED, sentence)
            raise HypervisorError(sentence, error.hint) from None
        self.pid = answer["pid"]
        if self.pid is not None:
            self._ledger.has_process(self.pid)
            _be_gentle(self.pid)
        self._console.connect()
        self._change(MachineState.RUNNING)
        self._calls.watch(self.id, self._news)

    def power_off(self) -> Deferred[None]:
        return self._alone(self._power_off)

    async def _power_off(self) -> None:
        if self.state in (MachineState.DEFINED, MachineState.STOPPED, MachineState.DESTROYED):
            return
        self._cpu_time.look(self.pid)
        await self._ask("power_off", END_DEADLINE)
        self._console.close()
        if self.state in _ALIVE:
            self._change(MachineState.STOPPED)

    def destroy(self) -> Deferred[None]:
        return self._alone(self._destroy)

    async def _destroy(self) -> None:
        if self.state is MachineState.DESTROYED:
            return
        if self.state in _ALIVE:
            await self._power_off()
        self._calls.forget(self.id)
        await self._ask("remove", STATE_DEADLINE, directory=str(self.spec.directory))
        await self._ports.close()
        self._console.close()
        shutil.rmtree(self.spec.directory, ignore_errors=True)
        self._ledger.close()
        self._change(MachineState.DESTROYED)

    # -- pause and resume

    def pause(self) -> Deferred[None]:
        return self._alone(lambda: self._switch("pause", MachineState.RUNNING, MachineState.PAUSED))

    def resume(self) -> Deferred[None]:
        return self._alone(lambda: self._switch("resume", MachineState.PAUSED, MachineState.RUNNING))

    async def _switch(self, call: str, before: MachineState, after: MachineState) -> None:
        if self.state is after:
            return
        if self.state is not before:
            raise HypervisorError(f"{self.spec.name} is {self.state.value}, not {before.value}")
        await self._ask(call, SHORT)
        self._change(after)

    # -- looking

    def leave(self) -> Deferred[None]:
        return self._cannot("outlive its host agent")

    def save_state(self) -> Deferred[None]:
        return self._cannot("be saved")

    def snapshot(self, name: str, paused: Callable[[], None]) -> Deferred[None]:
        return self._cannot("make snapshots")

    def restore(self, name: str) -> Deferred[None]:
        return self._cannot("make snapshots")

    def snapshots(self) -> Deferred[list[str]]:
        return succeed([])

    def delete_snapshot(self, name: str) -> Deferred[None]:
        return self._cannot("make snapshots")

    def _cannot(self, what: str) -> Deferred[None]:
        return fail(HypervisorError(f"the VM {self.spec.name} cannot {what} with this driver"))

    def cpu_seconds(self) -> float:
        return self._cpu_before + self._cpu_time.look(self.pid)

    def console_tail(self, lines: int = 20) -> str:
        return self._console.tail(lines)


def _be_gentle(pid: int) -> None:
    """Lowest priority, like every task on a volunteer's host."""
    if sys.platform == "win32":
        lowest = psutil.IDLE_PRIORITY_CLASS
    else:
        lowest = 19
    try:
        psutil.Process(pid).nice(lowest)
    except psutil.Error:
        pass  # it has ended, or belongs to root for a moment: it only runs at the usual priority then
