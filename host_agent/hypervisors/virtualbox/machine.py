"""One VM of VirtualBox. Everything that reaches VirtualBox goes through `calls.py`, each call with a deadline."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import attrs
import psutil
from twisted.internet.defer import Deferred, DeferredLock, succeed
from twisted.internet.error import CannotListenError
from twisted.internet.task import deferLater
from twisted.logger import Logger

from common.files import write_private
from host_agent.ledger import LedgerEntry
from host_agent.process_identity import identity_of

from ..base import HypervisorError, MachineSpec, MachineState
from ..cpu_time import CpuTime
from ..loopback_ports import LOOPBACK, ServicePorts, tell_guest
from .calls import LOST, Calls
from .config_iso import config_iso
from .console import Console, console_place
from .record import Record
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
    "Saved": MachineState.SAVED,
    "Aborted": MachineState.CRASHED,
    "AbortedSaved": MachineState.CRASHED,
    "Stuck": MachineState.CRASHED,
    "Gone": MachineState.CRASHED,
    LOST: MachineState.CRASHED,
    "Running": MachineState.RUNNING,
    "Paused": MachineState.PAUSED,
}
REASONS = {
    "PoweredOff": "the guest powered itself off",
    "Aborted": "VirtualBox's process of the VM ended unexpectedly",
    "AbortedSaved": "VirtualBox's process of the VM ended before its saved state was restored",
    "Stuck": "VirtualBox stopped the guest after a fatal error of its processor",
    LOST: "VirtualBox's service ended, and the VM with it",
    "Gone": "VirtualBox does not know the VM any more",
}
# In which state a machine is taken over from an earlier host agent.
ADOPTED = {
    "Running": MachineState.RUNNING,
    "Paused": MachineState.PAUSED,
    "Saved": MachineState.SAVED,
    "AbortedSaved": MachineState.SAVED,
    "PoweredOff": MachineState.STOPPED,
    "Aborted": MachineState.CRASHED,
}
SETTLE_TICK = 0.2  # seconds
_ALIVE = (MachineState.STARTING, MachineState.RUNNING, MachineState.PAUSED)


class VirtualBoxMachine:
    """One VM. Operations of one VM wait for each other; those of several do not."""

    _log = Logger()

    def __init__(self, reactor: Any, calls: Calls, spec: MachineSpec, ledger: LedgerEntry, record: Record) -> None:
        self.spec = spec
        self.id = record.machine  # VirtualBox's UUID of it
        self.state = MachineState.DEFINED
        self.pid: int | None = None
        self._reactor = reactor
        self._calls = calls
        self._ledger = ledger
        self._record = record
        self._ports = ServicePorts(reactor, spec.services, record.address)
        self._console_place = console_place(ledger.path, spec.instance)
        self._console = Console(reactor, self._console_place, spec.directory / "console.log")
        self._one = DeferredLock()
        self._news_passed_by = False
        self._cpu_time = CpuTime()
        self._left = False

    # -- making

    async def make(self, base: str, settings: Settings) -> None:
        """Register it with VirtualBox, its disk a difference over `base`."""
        spec = self.spec
        self._ports.open()
        self._keep(ports=self._ports.places)
        seen = GATEWAY if self._record.address == LOOPBACK else self._record.address
        told = tell_guest(spec.guest_config, GATEWAY, seen, self._ports.places)
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
            console=self._console_place,
            memory_mb=spec.memory_mb,
            cpus=spec.cpus,
            cpu_cap=settings.cpu_cap,
            network=settings.network,
        )

    def _keep(self, **changes: Any) -> None:
        """Write down what a successor of this host agent has to know."""
        self._record = attrs.evolve(self._record, **changes)
        self._record.write(self.spec.directory)

    async def take_over(self) -> bool:
        """Go on with what an earlier host agent left; False when nothing of it can be used."""
        found = await self._settled()
        state = ADOPTED.get(found["state"])
        if state is None or (state in (MachineState.STOPPED, MachineState.CRASHED) and not found["snapshots"]):
            return False
        try:
            await self._ports.open_again(self._record.ports)
        except CannotListenError as error:
            raise HypervisorError(f"a port of the VM {self.spec.name} is taken by another program: {error}") from None
        self._keep(owner=identity_of(os.getpid()))
        self.state = state
        if state in _ALIVE:
            self._has_process(found["pid"])
            self._console.connect()
            self._calls.watch(self.id, self._news)
        return True

    async def _settled(self) -> dict[str, Any]:
        """What VirtualBox says of the machine, once it is not on its way to another state."""
        for _ in range(int(SHORT / SETTLE_TICK)):
            try:
                found: dict[str, Any] = await self._ask("look", SHORT)
            except HypervisorError as error:
                if "does not know the machine" in str(error):
                    return {"state": "Gone", "pid": None, "snapshots": []}
                raise
            if found["state"] in ADOPTED or found["state"] == "Stuck":
                return found
            await deferLater(self._reactor, SETTLE_TICK)
        raise HypervisorError(f"the VM {self.spec.name} stays {found['state']}, and cannot be taken over")

    # -- states

    def _change(self, state: MachineState, reason: str = "") -> None:
        if state not in _ALIVE:
            self._process_ended()
        if state is not self.state:
            self.state = state
            if not self._left:
                self.spec.on_state(state, reason)

    def _process_ended(self) -> None:
        self._console.close()
        if self.pid is not None:
            self._cpu_time.look(self.pid)
            self._keep(cpu_before=self._record.cpu_before + self._cpu_time.seconds)
            self._cpu_time = CpuTime()
            self.pid = None

    def _has_process(self, pid: int | None) -> None:
        self.pid = pid
        if pid is not None:
            self._ledger.has_process(pid)
            _be_gentle(pid)

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
        self._console.connect()
        try:
            answer = await self._ask("start", START_DEADLINE)
        except HypervisorError as error:
            sentence = f"the VM {self.spec.name} did not start: {str(error).partition(': ')[2]}"
            self._change(MachineState.CRASHED, sentence)
            raise HypervisorError(sentence, error.hint) from None
        self._has_process(answer["pid"])
        self._change(MachineState.RUNNING)
        self._calls.watch(self.id, self._news)

    def power_off(self) -> Deferred[None]:
        return self._alone(self._power_off)

    async def _power_off(self) -> None:
        if self.state not in (*_ALIVE, MachineState.CRASHED):  # a crashed one may still have a process
            return
        self._cpu_time.look(self.pid)
        await self._ask("power_off", END_DEADLINE)
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

    def leave(self) -> Deferred[None]:
        return self._alone(self._leave)

    async def _leave(self) -> None:
        self._left = True
        self._calls.forget(self.id)
        self._console.close()
        await self._ports.close()
        self._cpu_time.look(self.pid)
        self._keep(owner=None)

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

    # -- saved states and snapshots

    def save_state(self) -> Deferred[None]:
        return self._alone(self._save_state)

    async def _save_state(self) -> None:
        if self.state is MachineState.SAVED:
            return
        self._needs_life("saved")
        self._cpu_time.look(self.pid)
        await self._ask("save_state", STATE_DEADLINE)
        self._change(MachineState.SAVED)

    def _needs_life(self, done: str) -> None:
        if self.state not in (MachineState.RUNNING, MachineState.PAUSED):
            raise HypervisorError(f"{self.spec.name} is {self.state.value} and cannot be {done}")

    def snapshot(self, name: str, paused: Callable[[], None]) -> Deferred[None]:
        return self._alone(lambda: self._snapshot(name, paused))

    async def _snapshot(self, name: str, paused: Callable[[], None]) -> None:
        self._needs_life("kept as a snapshot")
        runs = self.state is MachineState.RUNNING
        before = await self._named(name)
        # VirtualBox can do it without a stop, but not say at which moment: `paused` belongs to that moment.
        if runs:
            await self._ask("pause", SHORT)
        try:
            paused()
            await self._ask("snapshot", STATE_DEADLINE, name=name)
        finally:
            if runs:
                await self._ask("resume", SHORT)
        for old in before:
            await self._ask("delete_snapshot", STATE_DEADLINE, snapshot=old)

    async def _named(self, name: str) -> list[str]:
        """UUIDs of the snapshots of this name, the oldest first."""
        found = await self._ask("look", SHORT)
        return [snapshot["id"] for snapshot in found["snapshots"] if snapshot["name"] == name]

    def restore(self, name: str) -> Deferred[None]:
        return self._alone(lambda: self._restore(name))

    async def _restore(self, name: str) -> None:
        found = await self._named(name) if self.state is not MachineState.DESTROYED else []
        if not found:
            raise HypervisorError(f"{self.spec.name} has no snapshot {name}")
        await self._power_off()
        await self._ask("restore", STATE_DEADLINE, snapshot=found[-1])
        await self._start()

    def snapshots(self) -> Deferred[list[str]]:
        return self._alone(self._snapshots)

    async def _snapshots(self) -> list[str]:
        if self.state is MachineState.DESTROYED:
            return []
        found = await self._ask("look", SHORT)
        return [snapshot["name"] for snapshot in found["snapshots"]]

    def delete_snapshot(self, name: str) -> Deferred[None]:
        return self._alone(lambda: self._ask("delete_snapshot", STATE_DEADLINE, snapshot=name))

    # -- looking

    def cpu_seconds(self) -> float:
        return self._record.cpu_before + self._cpu_time.look(self.pid)

    def limit(self, cpu_share: float) -> None:
        pass  # its cap is a setting of the volunteer's, and of the time when it is made

    def screen(self, path: Path) -> Deferred[bool]:
        return succeed(False)

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
