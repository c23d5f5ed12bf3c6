"""Checkpoints of a running VM, and the way back to them.

A checkpoint is a snapshot of the hypervisor's and its *mark*: how far the VM's commands, their output files and
whoever asked for it are at that moment. The two newest are kept. A checkpoint counts when the snapshot is whole, and
the mark and the output up to it are on the disk; one of which something is missing is passed over on the way back.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twisted.internet.threads import deferToThread
from twisted.logger import Logger

from common.errors import VMwrapperError
from common.files import runtime_dir

from .guests import Guests
from .hypervisors.base import SAVED, HypervisorError, Machine, MachineState
from .requests import Requests
from .state import AgentState
from .turn import Turn

if TYPE_CHECKING:
    from .virtual_machine import VirtualMachine

KEEP = 2
TURN_FILE = "checkpoint.lock"  # in the runtime directory, which all host agents of a user share
TURN_DEADLINE = 120.0  # seconds that other VMs' checkpoints may take
# Which checkpoint each attempt in a row goes back to: a VM that cannot go on from its newest may from the one before.
ATTEMPTS = (-1, -1, -1, -1, -2)

_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,9})")


class Checkpoints:
    """Keeps and restores what VMs are; `vms.py` says when."""

    _log = Logger()

    def __init__(self, reactor: Any, state: AgentState, guests: Guests, requests: Requests) -> None:
        self._state = state
        self._guests = guests
        self._requests = requests
        self._reactor = reactor
        self._turn = Turn(reactor, runtime_dir() / TURN_FILE)

    # -- forwards

    async def make(self, vm: VirtualMachine, note: dict[str, Any]) -> dict[str, Any]:
        """Keep the VM as it is now, and `note` with it; when this fails the earlier checkpoints are as they were."""
        machine = machine_of(vm)
        began = self._reactor.seconds()
        if not await self._turn.take(TURN_DEADLINE):
            raise HypervisorError(f"The VM {vm.name} was not kept: other VMs' checkpoints took too long.")
        waited = self._reactor.seconds() - began
        try:
            async with vm.keeping:
                numbers = [int(each[1]) for name in await machine.snapshots() if (each := _CHECKPOINT.fullmatch(name))]
                name = f"checkpoint-{max(numbers, default=0) + 1}"
                await self.snapshot(vm, name, note)
                await self._drop_old(vm)
        finally:
            self._turn.give_back()
        vm.setbacks = 0
        return {"snapshot": name, "seconds": self._reactor.seconds() - began, "waited_s": waited}

    async def snapshot(self, vm: VirtualMachine, name: str, note: dict[str, Any] | None = None) -> None:
        """Keep the VM under a name; it goes on afterwards."""
        mark = self._state.mark_file(vm.guest.id, name)
        files: list[Path] = []

        def paused() -> None:
            files.extend(self._requests.mark(vm.guest, mark, note))

        fresh = not mark.exists()
        try:
            await machine_of(vm).snapshot(name, paused)
            await deferToThread(_to_disk, [*files, mark.parent])
        except OSError as error:
            if fresh:
                mark.unlink(missing_ok=True)
            raise HypervisorError(f"The VM {vm.name} was not kept: {error.strerror}: {error.filename}") from None
        except BaseException:
            if fresh:
                mark.unlink(missing_ok=True)
            raise

    async def save(self, vm: VirtualMachine) -> None:
        """Memory to the disk; nothing of the VM runs any more."""
        machine, mark = machine_of(vm), self._state.mark_file(vm.guest.id, SAVED)
        if machine.state is MachineState.SAVED:
            return
        runs = machine.state is MachineState.RUNNING
        if runs:
            await machine.pause()
        # Beside the mark of an earlier saved state, which remains when this one does not come about.
        pending = mark.with_name(f"{mark.name}.new")
        try:
            files = self._requests.mark(vm.guest, pending, None)
            await machine.save_state()
            pending.replace(mark)
            await deferToThread(_to_disk, [*files, mark.parent])
        except BaseException:
            pending.unlink(missing_ok=True)
            if runs and machine.state is MachineState.PAUSED:
                await machine.resume()
            raise

    def settle(self, vm: VirtualMachine) -> None:
        """An earlier host agent may have died while it saved the VM."""
        mark = self._state.mark_file(vm.guest.id, SAVED)
        pending = mark.with_name(f"{mark.name}.new")
        if pending.exists():
            if machine_of(vm).state is MachineState.SAVED:
                pending.replace(mark)
            else:
                pending.unlink()

    async def delete(self, vm: VirtualMachine, name: str) -> None:
        await machine_of(vm).delete_snapshot(name)
        self._state.mark_file(vm.guest.id, name).unlink(missing_ok=True)

    async def _drop_old(self, vm: VirtualMachine) -> None:
        """The newest are safely there: remove our others, which are only large, and marks of what never came about."""
        there = await machine_of(vm).snapshots()
        kept = [name for name in await self.usable(vm) if _is_ours(name)][-KEEP:]
        for name in there:
            if _is_ours(name) and name not in kept:
                try:
                    await self.delete(vm, name)
                except VMwrapperError as error:
                    self._log.warn("{name}: an old checkpoint stays: {error}", name=vm.name, error=error)
        for mark in self._state.marks(vm.guest.id):
            name = mark.name.removeprefix(f"{vm.guest.id}.")
            if _is_ours(name) and name not in there:
                mark.unlink(missing_ok=True)

    # -- back

    async def usable(self, vm: VirtualMachine) -> list[str]:
        """What the VM can go back to with its commands and their output, the oldest first."""
        return [name for name in await machine_of(vm).snapshots() if self._requests.can_roll_back(self._mark(vm, name))]

    def has_marks(self, vm: VirtualMachine) -> bool:
        """Whether there may be something to go back to."""
        return bool(self._state.marks(vm.guest.id))

    def _mark(self, vm: VirtualMachine, name: str) -> Path:
        return self._state.mark_file(vm.guest.id, name)

    async def restore(self, vm: VirtualMachine, name: str) -> None:
        """Go back: the guest, its commands and their output; a new epoch begins."""
        machine = machine_of(vm)
        if name not in await machine.snapshots():
            raise HypervisorError(f"The VM {vm.name} has no snapshot {name}.")
        if machine.state is MachineState.RUNNING:
            await machine.pause()
        await self._undo_newer(vm, name)
        # While the guest cannot speak, and on disk: nothing that it said before counts in the new epoch.
        self._guests.restored(vm.guest)
        self._requests.roll_back(vm.guest, self._mark(vm, name), f"the VM went back to its snapshot {name}")
        await machine.restore(name)

    async def _undo_newer(self, vm: VirtualMachine, name: str) -> None:
        """Checkpoints after this one are of a time that is undone: the output that they count on is written anew."""
        there = await machine_of(vm).snapshots()
        for newer in there[there.index(name) + 1 :]:
            if _is_ours(newer):
                self._mark(vm, newer).unlink(missing_ok=True)

    async def go_back(self, vm: VirtualMachine) -> bool:
        """Go back to where the VM can go on from; False when there is nothing, or it has been tried often enough."""
        async with vm.keeping:  # one that is under way may yet come about, and is then the newest
            return await self._go_back(vm)

    async def _go_back(self, vm: VirtualMachine) -> bool:
        names = await self.usable(vm)
        while names and vm.setbacks < len(ATTEMPTS) and not vm.ending:
            name = names[max(ATTEMPTS[vm.setbacks], -len(names))]
            vm.setbacks += 1
            try:
                await self.restore(vm, name)
            except (VMwrapperError, OSError) as error:
                self._log.warn("{name} cannot go back to {snapshot}: {error}", name=vm.name, snapshot=name, error=error)
                continue
            self._log.info("{name} went back to {snapshot}", name=vm.name, snapshot=name)
            return True
        return False


def _is_ours(name: str) -> bool:
    """Whether a snapshot is one of those that this module makes by itself."""
    return name == SAVED or _CHECKPOINT.fullmatch(name) is not None


def machine_of(vm: VirtualMachine) -> Machine:
    """Its machine; HypervisorError while there is none."""
    if vm.machine is None:
        raise HypervisorError(f"The VM {vm.name} is not started yet.")
    return vm.machine


def _to_disk(paths: Iterable[Path]) -> None:
    """Files, and directories with the names in them; what is not there need not be."""
    for path in paths:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        except PermissionError:  # Windows does not open directories, and keeps their names by itself
            continue
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
