"""The VirtualBox driver: `vmwrapper-host-agent --hypervisor virtualbox`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from twisted.internet.defer import Deferred

from host_agent.ledger import LedgerEntry

from ..base import Capabilities, HeldByAnother, Machine, MachineSpec, Requirement
from ..loopback_ports import LOOPBACK
from .calls import Calls
from .images import BaseDisks
from .machine import GATEWAY, SHORT, VirtualBoxMachine
from .record import Record
from .requirements import requirements
from .settings import Settings


class VirtualBoxHypervisor:
    """VirtualBox as it is installed on this host, as this user."""

    name = "virtualbox"
    capabilities = Capabilities(save_state=True, live_snapshot=True, adopt=True)
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

    async def _create(self, spec: MachineSpec) -> Machine:
        base = await self._disks.disk_of(spec.image)
        machine = self._machine(spec, Record.new(await self._address()))
        try:
            await machine.make(str(base), self._settings)
        except BaseException:
            await machine.destroy()
            raise
        return machine

    async def _address(self) -> str:
        """Where a guest's services listen, for the network that is set."""
        kind, _, interface = self._settings.network.partition(":")
        if kind != "hostonly":
            return LOOPBACK
        return str(await self.calls.call("hostonly_address", SHORT, interface=interface))

    def _machine(self, spec: MachineSpec, record: Record) -> VirtualBoxMachine:
        ledger = LedgerEntry(spec.instance, spec.directory)
        ledger.has_machine(self.name, record.machine)
        return VirtualBoxMachine(self._reactor, self.calls, spec, ledger, record)

    def adopt(self, spec: MachineSpec) -> Deferred[Machine | None]:
        return Deferred.fromCoroutine(self._adopt(spec))

    async def _adopt(self, spec: MachineSpec) -> Machine | None:
        record = Record.read(spec.directory)
        if record is None:
            LedgerEntry(spec.instance, spec.directory).close()
            return None
        if record.held():
            raise HeldByAnother(f"the VM {spec.name} belongs to another host agent, process {record.owner_pid()}")
        machine = self._machine(spec, record)
        if await machine.take_over():
            return machine
        await machine.destroy()
        return None
