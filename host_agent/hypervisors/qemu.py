"""The QEMU driver: one process for each VM, steered over QMP.

QEMU connects to our socket, not we to its, so nothing is polled at the start, and a later host agent is found in the
same way. The process and the guest's console belong to a leash (`qemu_process.py`). The guest's network is closed but
for the service ports (`guest_ports.py`). A running QEMU is `qemu_vm.py`; how its states are
kept and restored is in `qemu_machine.py`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import Any

import psutil
from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.internet.utils import getProcessOutputAndValue
from twisted.logger import Logger

from host_agent.ledger import LedgerEntry, grace_time, ledger_dir, other_owner

from .base import Capabilities, HeldByAnother, HypervisorError, Machine, MachineSpec, Requirement
from .kvm import GAVE_UP, KvmProbe, remedy
from .process_end import process_end
from .qemu_machine import Clone, QemuMachine
from .qemu_options import (
    ARCHITECTURE,
    GATEWAY,
    HARDWARE,
    NAMES,
    QEMU,
    QEMU_IMG,
    REMEDY,
    TCG,
    emulated,
    find_program,
    program,
)
from .qemu_packing import ZSTD
from .qemu_states import States
from .qemu_templates import Templates
from .qemu_wiring import WINDOWS, gateway

__all__ = ["GATEWAY", "QEMU", "QemuHypervisor"]

FREE_MEMORY_MB = 512  # under which a VM will not do well
OWNER_ENDS = 30.0  # seconds for a host agent that lets go of its VMs to be gone
_HARDWARE = NAMES[HARDWARE].split()[-1]


class QemuHypervisor:
    """QEMU as it is installed on this host."""

    name = "qemu"
    # States need descriptors that go to QEMU through its monitor's socket; Windows has no such thing.
    # A VM ends with its kernel, and what brings it back, a state, has the memory that belongs to the disk.
    capabilities = Capabilities(
        save_state=not WINDOWS,
        live_snapshot=not WINDOWS,
        clone_from_template=not WINDOWS,
        adopt=not WINDOWS,
        boots_again=False,
    )
    guest_gateway = gateway()
    _log = Logger()

    def __init__(self, reactor: Any, grace: float | None = None, warm: bool | None = None) -> None:
        self._reactor = reactor
        self._grace = grace_time() if grace is None else grace
        wanted = os.environ.get("VMWRAPPER_WARM_START", "1") != "0" if warm is None else warm
        self._warm = wanted and self.capabilities.clone_from_template
        self._templates = Templates(reactor, self._gave_up)
        self._kvm: KvmProbe | None = None
        self._anew = False

    def look_anew(self) -> None:
        self._anew = True

    def requirements(self) -> Deferred[list[Requirement]]:
        return Deferred.fromCoroutine(self._requirements())

    async def _requirements(self) -> list[Requirement]:
        found = []
        for name in (QEMU, QEMU_IMG, *([ZSTD] if self.capabilities.save_state else [])):
            path = find_program(name)
            words = ""
            if path is not None:
                output, _, status = await getProcessOutputAndValue(path, ["--version"], env=None)
                words = output.decode("utf-8", "replace").partition("\n")[0] if status == 0 else ""
            met = bool(words)
            found.append(Requirement(name, met, words or ("does not run" if path else "not found"), REMEDY))
        if found[0].met:
            anew, self._anew = self._anew, False
            why_not = await self._probe().why_not(anew)
            words = "works" if not why_not else f"cannot be used: {why_not}; VMs run emulated, about ten times slower"
            found.append(Requirement(_HARDWARE, not why_not, words, remedy(why_not), fatal=False))
        if WINDOWS:
            words = "guests reach this computer's own services, and the internet"
            found.append(Requirement("network", False, words, "give VMs only programs that you trust", fatal=False))
        free = psutil.virtual_memory().available // 2**20
        less = "close other programs, or give VMs less memory"
        found.append(Requirement("free memory", free >= FREE_MEMORY_MB, f"{free} MB", less, fatal=False))
        return found

    def _probe(self) -> KvmProbe:
        if self._kvm is None:
            self._kvm = KvmProbe(self._reactor, program(QEMU), HARDWARE)
        return self._kvm

    def _gave_up(self, words: str) -> None:
        """On a guest: the next ones are emulated, here and with the host agents to come."""
        with contextlib.suppress(HypervisorError):  # an adopted VM's, and QEMU is being replaced at this moment
            self._probe().gave_up(words)
        cannot = f"{_HARDWARE} cannot be used: {GAVE_UP}{words}"
        self._log.warn("this host: {cannot}; VMs run emulated from now on", cannot=cannot)

    def create(self, spec: MachineSpec) -> Deferred[Machine]:
        return Deferred.fromCoroutine(self._create(spec))

    async def _create(self, spec: MachineSpec) -> Machine:
        if spec.image.architecture != ARCHITECTURE:
            raise HypervisorError(
                f"the image {spec.image.name} is for {spec.image.architecture}, this host is {ARCHITECTURE}"
            )
        program(QEMU_IMG)
        ledger = LedgerEntry(spec.instance, spec.directory)
        machine = QemuMachine(self._reactor, spec, ledger, States(spec.directory), self._grace)
        machine.gave_up = self._gave_up
        try:
            clone = await self._choose(machine)
            if clone is None or not await machine.make_from(clone):
                await machine.make_disk(spec.image.disk)
        except BaseException:
            await machine.destroy()
            raise
        return machine

    async def _choose(self, machine: QemuMachine) -> Clone | None:
        """What drives a new VM, and what it starts from. A template's guest may be the one that the accelerator gives
        up on: then another choice follows, and no third, for it is remembered."""
        while True:
            why_not = await self._probe().why_not()
            machine.accelerator = TCG if why_not else HARDWARE
            if why_not.startswith(GAVE_UP):
                machine.remark = f", for {_HARDWARE} cannot be used: {why_not}"
            clone = await self._templates.clone_for(machine.spec, machine.accelerator) if self._warm else None
            if clone is not None or emulated(machine.accelerator) or not await self._probe().why_not():
                return clone

    def adopt(self, spec: MachineSpec) -> Deferred[Machine | None]:
        return Deferred.fromCoroutine(self._adopt(spec))

    async def _adopt(self, spec: MachineSpec) -> Machine | None:
        if (owner := other_owner(spec.instance)) is not None:
            # Whoever asks has its state directory now, so it is about to end; on a busy machine that takes seconds.
            with contextlib.suppress(defer.TimeoutError):
                await process_end(self._reactor, owner).addTimeout(OWNER_ENDS, self._reactor)
            if other_owner(spec.instance) is not None:
                raise HeldByAnother(f"the VM {spec.name} belongs to another host agent", "end that agent first")
        states = States.load(spec.directory)
        place = ledger_dir() / spec.instance
        machine = QemuMachine(self._reactor, spec, place, states, self._grace)
        machine.gave_up = self._gave_up
        if await machine.take_over():
            if machine.pid is None and not machine.given_up:
                why_not = await self._probe().why_not()
                # That it gave up on another VM's guest is no reason to lose states that need it; others do not ask.
                machine.accelerator = HARDWARE if not why_not or why_not.startswith(GAVE_UP) else TCG
            return machine
        shutil.rmtree(spec.directory, ignore_errors=True)
        shutil.rmtree(place, ignore_errors=True)
        return None
