"""The virtual machines of this host agent: made from an image, started, awaited, ended, removed.

A VM is ready when its agent answers. Whatever goes wrong before has a deadline and a sentence with the console's
last lines; whatever goes wrong later is told to everybody who waits for something from that VM.
"""

from __future__ import annotations

import enum
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from twisted.internet import defer
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.interfaces import IProtocolFactory, IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from common.broker_address import Credentials
from common.errors import ConfigError, VMwrapperError

from .admission import Admission, NoRoom
from .broker.access import BrokerAccess
from .checkpoints import Checkpoints, machine_of
from .events import Happened
from .guests import ForeignAgent, Guest, Guests, Identity, Presence
from .hypervisors.base import (
    Door,
    HeldByAnother,
    Hypervisor,
    HypervisorError,
    HypervisorHangs,
    Machine,
    MachineSpec,
    MachineState,
    Reachable,
)
from .hypervisors.images import NO_IMAGE, Image, image_for, load_image
from .once import Once
from .outward import Outward
from .requests import Requests
from .state import AgentState, VmRecord
from .trouble import Troubles, Watched, keep_console, keep_what_is_left
from .virtual_machine import StateUpdate, VirtualMachine, VMExists, VMFailed
from .wrapper.guest_calls import POWERED_OFF

START_DEADLINE = 180.0  # seconds from the start to the agent's HELLO
CONSOLE_LINES = 12

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,63}")


class Fate(enum.Enum):
    """What becomes of the VMs when their host agent ends. One that is saved always waits for the next agent."""

    END = "end"  # they are removed
    KEEP = "keep"  # what has checkpoints waits on the disk for the next agent, and goes on from the newest
    LEAVE = "leave"  # they go on, for as long as a VM does without an agent: the next one takes them over


ServicesFor = Callable[[Guest, Path], dict[int, IProtocolFactory]]  # by the guest and the directory of its VM


class VirtualMachines:
    """All VMs of this host agent, by the name people use."""

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        broker: BrokerAccess,
        hypervisor: Hypervisor,
        guests: Guests,
        requests: Requests,
        state: AgentState,
        checkpoints: Checkpoints,
        services_for: ServicesFor,
        admission: Admission | None = None,
    ) -> None:
        self._clock = clock
        self._broker = broker
        self._hypervisor = hypervisor
        self._guests = guests
        self._requests = requests
        self._state = state
        self.checkpoints = checkpoints
        self._services_for = services_for
        self.missing: list[str] = []  # on this host: why VMs may not start
        self._vms: dict[str, VirtualMachine] = {}
        self._admission = admission or Admission(clock)
        self._troubles = Troubles(clock, lambda: self, self._fail)

    def __iter__(self) -> Iterator[VirtualMachine]:
        return iter(list(self._vms.values()))

    def get(self, name: str) -> VirtualMachine | None:
        return self._vms.get(name)

    def describe(self, vm: VirtualMachine) -> dict[str, Any]:
        return vm.describe(self._requests.running_in(vm.guest), self._clock.seconds())

    async def start(
        self,
        name: str,
        image: Image,
        parent: Path,
        *,
        memory_mb: int = 0,
        cpus: int = 0,
        deadline: float = 0.0,
        network: bool = False,
        watch: StateUpdate,
    ) -> VirtualMachine:
        """Make a VM from an image and wait for its agent; whoever asks again meanwhile waits for the same VM.

        When that fails, nothing of the VM is left and the error says why.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{name!r} cannot name a VM: 1 to 64 letters, digits, spaces, '.', '_', '-'")
        there = self._vms.get(name)
        if there is not None and there.starting is not None and there.image == image:
            there.watchers.append(watch)
            waiter: Deferred[None] = Deferred()
            there.starting.append(waiter)
            await waiter
            return there
        if there is not None:
            raise VMExists(name)
        credentials = await self._broker.take_login()
        if name in self._vms:
            self._broker.return_login(credentials.login)
            raise VMExists(name)
        guest = self._guests.expect(Identity.new(credentials), name)
        directory = parent / f"vm-{name.replace(' ', '_')}-{guest.id[2:10]}"
        vm = VirtualMachine(
            name,
            image,
            guest,
            self._hypervisor.name,
            memory_mb or image.memory_mb,
            cpus or 1,
            directory,
            outward=Outward(self._clock) if network else None,
            began=self._clock.seconds(),
            watchers=[watch],
        )
        self._vms[name] = vm
        try:
            vm.ticket = await self._admission.enter(
                guest.id,
                vm.memory_mb,
                vm.cpus,
                lambda why: vm.tell("waiting", why),
                lambda: not vm.ending,
            )
            directory.mkdir(mode=0o700, parents=True)
            self.keep(guest)
            vm.machine = await self._hypervisor.create(self._spec(vm))
            await vm.machine.start()
            with vm.telling_of_its_start(self._clock):
                arrival = vm.guest.wait_present()
                arrival.addTimeout(deadline or START_DEADLINE, self._clock)
                await arrival
        except Exception as error:
            failed = await self._give_up(vm, error, deadline or START_DEADLINE)
            waiting, vm.starting = vm.starting or [], None
            for waiter in waiting:
                waiter.errback(failed)
            raise failed from None
        vm.ticket.started()
        waiting, vm.starting = vm.starting or [], None
        vm.tell("ready", f"agent {guest.agent_version} answers")
        for waiter in waiting:
            waiter.callback(None)
        return vm

    def keep(self, guest: Guest) -> None:
        """Write down what a successor of this host agent has to know about a VM."""
        vm = self._vms.get(guest.name)
        if vm is None or vm.guest is not guest or vm.ending:
            return
        self._state.keep(vm.record())

    def expect_all(self) -> None:
        """Know the guests of the host agent before us again; `adopt_all` then looks for their VMs."""
        for record in self._state.vms.values():
            credentials = Credentials(record.login, record.passcode)
            self._broker.keep_login(credentials)
            identity = Identity(record.instance, credentials, record.secret)
            self._guests.expect(identity, record.name, record.epoch, record.boot)

    async def adopt_all(self) -> None:
        """Take over the VMs that the host agent before us left running; what belonged to the others is lost."""
        for record in list(self._state.vms.values()):
            guest = self._guests.get(record.instance)
            assert guest is not None
            vm = None
            try:
                image = self._image_of(record)
                directory = Path(record.directory)
                vm = VirtualMachine(
                    record.name, image, guest, self._hypervisor.name, record.memory_mb, record.cpus, directory
                )
                vm.outward = Outward(self._clock) if record.network else None
                vm.began = self._clock.seconds()
                vm.adopting, vm.starting = True, None
                self._vms[vm.name] = vm
                vm.ticket = self._admission.again(record.instance, record.memory_mb, record.cpus)
                vm.machine = await self._hypervisor.adopt(self._spec(vm))
                found = vm.machine is not None and await self._has_more_to_do(vm)
                why = "its VM ended while no host agent was there"
            except HeldByAnother:
                # Nothing of it may be touched, and our start fails; whoever started us tries again.
                self._vms.pop(record.name, None)
                raise
            except Exception as error:
                # One VM that cannot be had must not keep the others from being taken over.
                found, why = False, f"its VM could not be taken over: {error}"
                if not isinstance(error, VMwrapperError):
                    self._log.failure("{name} could not be taken over", name=record.name)
            if found and vm is not None:
                vm.adopting = False
                self._log.info("took over the VM {name} of an earlier host agent", name=record.name)
                continue
            self._log.warn("{name}: {why}", name=record.name, why=why)
            self._guests.forget(guest, why)
            self._requests.guest_gone(guest, why)
            self._vms.pop(record.name, None)
            if vm is not None and vm.ticket is not None:
                vm.ticket.close()
            shutil.rmtree(record.directory, ignore_errors=True)
            self._state.drop(record.instance)
            self._broker.return_login(record.login)

    async def _has_more_to_do(self, vm: VirtualMachine) -> bool:
        """Whether an adopted VM runs or can: one that ended goes back to its newest snapshot."""
        machine = machine_of(vm)
        self.checkpoints.settle(vm)
        if machine.state not in (MachineState.STOPPED, MachineState.CRASHED):
            return True
        if await self.checkpoints.go_back(vm):
            return True
        await machine.destroy()
        return False

    def image_for(self, name: str, wanted: str) -> Image:
        """The image of a VM that is to be started; ConfigError says which there are."""
        return image_for(name, wanted) if self._hypervisor.capabilities.image else NO_IMAGE

    def _image_of(self, record: VmRecord) -> Image:
        return load_image(Path(record.image)) if self._hypervisor.capabilities.image else NO_IMAGE

    def _spec(self, vm: VirtualMachine) -> MachineSpec:
        def changed(state: MachineState, reason: str) -> None:
            self._state_changed(vm, state, reason)

        hypervisor = self._hypervisor
        return vm.spec(
            hypervisor.guest_gateway,
            self._broker,
            self._services_for(vm.guest, vm.directory),
            changed,
            boots_again=hypervisor.capabilities.boots_again,
        )

    async def _give_up(self, vm: VirtualMachine, error: Exception, deadline: float) -> VMFailed:
        """Remove what there is of it; returns why."""
        console = vm.last_words(CONSOLE_LINES)
        kept = await keep_what_is_left(self._clock, vm, screen=True)
        await self.stop(vm, "it did not start")
        if isinstance(error, defer.TimeoutError):
            sentence = f"The VM {vm.name} runs, but its agent did not answer within {deadline:.0f} s."
        elif isinstance(error, VMwrapperError):
            sentence = vm.reason or str(error)
        elif isinstance(error, OSError):
            sentence = f"The VM {vm.name} cannot be made: {error.strerror}: {error.filename}"
        else:
            self._log.failure("the VM {name} failed", name=vm.name)
            sentence = f"The VM {vm.name} failed: {error!r}"
        missing = "\n".join(self.missing) or "vmctl doctor looks for the cause"
        hint = f"the console's last lines:\n{_indent(console)}" if console else missing
        if kept:
            hint += f"\nkept: {', '.join(str(path) for path in kept)}"
        if isinstance(error, (ForeignAgent, NoRoom)):
            return VMFailed(sentence, error.hint, error.code)
        return VMFailed(sentence, hint)

    def _state_changed(self, vm: VirtualMachine, state: MachineState, reason: str) -> None:
        tell = self._log.warn if state is MachineState.CRASHED else self._log.info
        tell(
            "{vm}: {state} {reason}",
            event=Happened.VM_STATE,
            vm=vm.name,
            instance=vm.guest.id,
            state=state.value,
            reason=reason,
        )
        vm.tell(state.value, reason)
        if state in (MachineState.PAUSED, MachineState.SAVED):
            vm.guest.paused(self._clock.seconds())
        elif state is MachineState.RUNNING:
            vm.guest.resumed(self._clock.seconds())
        if state is MachineState.PAUSED and reason and not vm.held:
            self._troubles.stopped_by_hypervisor(vm, reason)
        if vm.ending or vm.adopting or state not in (MachineState.CRASHED, MachineState.STOPPED):
            return
        if vm.failing:
            state, reason, vm.failing = MachineState.CRASHED, vm.failing, ""
        keep_console(vm)
        verb = "ended unexpectedly" if state is MachineState.CRASHED else POWERED_OFF
        why = f"The VM {vm.name} {verb}" + (f": {reason}" if reason else "")
        console = vm.last_words(CONSOLE_LINES)
        if console:
            self._log.info("{name}: the console's last lines:\n{text}", name=vm.name, text=_indent(console))
        if vm.going_back:
            return  # whoever brings it back sees it
        if state is MachineState.CRASHED and vm.ready and self.checkpoints.has_marks(vm):
            vm.going_back = True
            paused = vm.held or vm.guest.is_paused
            # Not from within the driver's own words: it is still putting away what ended.
            going_back = deferLater(self._clock, 0, lambda: Deferred.fromCoroutine(self._go_back(vm, why, paused)))
            going_back.addErrback(lambda failure: self._log.failure("{name}", failure, name=vm.name))
        else:
            self._is_over(vm, why)

    async def _go_back(self, vm: VirtualMachine, why: str, paused: bool) -> None:
        """A VM ended that should not have: back to where it can go on from, else it is over."""
        try:
            self._log.warn("{why}; going back to its newest checkpoint", why=why)
            found = await self.checkpoints.go_back(vm)
            if found and paused and not vm.ending:
                await self.pause(vm)
        finally:
            vm.going_back = False
        machine = machine_of(vm)
        if not vm.ending and machine.state in (MachineState.CRASHED, MachineState.STOPPED):
            self._is_over(vm, why)

    def _is_over(self, vm: VirtualMachine, why: str) -> None:
        vm.reason = why
        self._guests.forget(vm.guest, why)
        self._requests.guest_gone(vm.guest, why)

    def stop(self, vm: VirtualMachine, reason: str = "it was stopped") -> Deferred[None]:
        """End a VM and remove everything of it."""
        if vm.end is None:
            vm.end = Once(lambda: self._stop(vm, reason))
        return vm.end()

    async def _stop(self, vm: VirtualMachine, reason: str) -> None:
        vm.ending = True
        if vm.outward is not None:
            vm.outward.switch(False)
        if vm.guest.presence is not Presence.GONE:
            sentence = f"The VM {vm.name} is gone: {reason}"
            self._guests.forget(vm.guest, sentence)
            self._requests.guest_gone(vm.guest, sentence)
        try:
            if vm.machine is not None:
                await vm.machine.destroy()
        except Exception:
            self._log.failure("{name} could not be removed cleanly", name=vm.name)
        finally:
            shutil.rmtree(vm.directory, ignore_errors=True)
            self._vms.pop(vm.name, None)
            if vm.ticket is not None:
                vm.ticket.close()
            self._state.drop(vm.guest.id)
            self._broker.return_login(vm.guest.identity.login)

    # -- steering

    def limit(self, vm: VirtualMachine, cpu_percent: float) -> None:
        """Of the time that its processors may run; also after a restore."""
        vm.cpu_share = cpu_percent / 100 if cpu_percent else 1.0
        machine_of(vm).limit(vm.cpu_share)

    def _fail(self, vm: Watched, reason: str) -> None:
        """A VM does not do its work: end it, as if it had crashed for this reason."""
        assert isinstance(vm, VirtualMachine)
        if vm.machine is None or vm.failing or vm.ending:
            return
        self._log.warn("{name} is ended: {reason}", name=vm.name, reason=reason)
        vm.failing, vm.stalled = reason, None
        ended = Deferred.fromCoroutine(self._end_failed(vm, vm.machine))
        ended.addErrback(lambda failure: self._log.failure("{name} could not be ended", failure, name=vm.name))

    async def _end_failed(self, vm: VirtualMachine, machine: Machine) -> None:
        await keep_what_is_left(self._clock, vm, screen=True)
        await machine.power_off()

    async def pause(self, vm: VirtualMachine) -> None:
        before, vm.held = vm.held, True
        try:
            await machine_of(vm).pause()
        except HypervisorHangs as error:
            self._fail(vm, str(error))  # it may compute on, though the volunteer wants quiet
            raise
        except BaseException:
            vm.held = before
            raise

    async def resume(self, vm: VirtualMachine) -> None:
        machine = machine_of(vm)
        vm.held = False
        if machine.state is MachineState.SAVED:
            self._guests.restored(vm.guest)
            await machine.start()
        else:
            try:
                await machine.resume()
            except HypervisorHangs as error:
                self._fail(vm, str(error))
                raise

    async def reach(self, vm: VirtualMachine, port: int) -> Door:
        """A door to a port of the guest; close it."""
        machine = machine_of(vm)
        if not isinstance(machine, Reachable):
            raise HypervisorError(f"no port of {vm.name} can be reached with {self._hypervisor.name}")
        return await machine.reach(port)

    async def stop_all(self, fate: Fate = Fate.END) -> None:
        """End every VM as `fate` says."""
        self._troubles.stop()
        await gatherResults([Deferred.fromCoroutine(self._meet(vm, fate)) for vm in self])

    async def _meet(self, vm: VirtualMachine, fate: Fate) -> None:
        machine = vm.machine
        if self._state.durable and machine is not None and vm.ready and not vm.ending:
            runs = machine.state in (MachineState.RUNNING, MachineState.PAUSED)
            if machine.state is MachineState.SAVED or (
                fate is Fate.LEAVE and runs and self._hypervisor.capabilities.adopt
            ):
                vm.ending = True
                await machine.leave()
                return
            if fate is not Fate.END and await self.checkpoints.usable(vm):
                vm.ending = True
                await machine.power_off()
                await machine.leave()
                return
        await self.stop(vm, "the host agent ends")


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
