"""One virtual machine of this host agent, with its guest: what is known of it, and how others are told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.interfaces import IProtocolFactory, IReactorTime
from twisted.internet.task import LoopingCall

from common.config import GuestConfig
from common.errors import ConfigError, VMwrapperError

from .admission import Ticket
from .broker.access import BrokerAccess
from .guests import Guest
from .hypervisors.base import Machine, MachineSpec, MachineState
from .hypervisors.images import Image
from .once import Once
from .outward import Outward
from .state import VmRecord
from .trouble import Stall

BROKER_PORT = 61613  # as guests see them, at the hypervisor's gateway
FILES_PORT = 61614
OUTWARD_PORT = 61615
PROGRESS_EVERY = 15.0  # seconds between words about a start that takes long

StateUpdate = Callable[[str, str], None]  # state, reason


class VMFailed(VMwrapperError):
    """A VM did not start, or ended by itself."""

    def __init__(self, sentence: str, hint: str = "", code: str = "") -> None:
        super().__init__(sentence, hint)
        self.code = code or "vm_failed"


class VMExists(ConfigError):
    """There is a VM of that name already."""

    code = "vm_exists"  # as in `docs/control.md`

    def __init__(self, name: str) -> None:
        super().__init__(f"there is a VM named {name} already")


@attrs.define(eq=False)
class VirtualMachine:
    """A VM with its guest."""

    name: str
    image: Image
    guest: Guest
    hypervisor: str
    memory_mb: int
    cpus: int
    directory: Path
    machine: Machine | None = None
    reason: str = ""
    failing: str = ""  # why we end it as failed
    held: bool = False  # somebody wants it to stand still
    stalled: Stall | None = None
    ticket: Ticket | None = attrs.field(default=None, repr=False)
    cpu_share: float = 1.0
    disk_mb: int = 0  # that it may use on this host; 0: no limit
    outward: Outward | None = None  # its way to the network
    began: float = 0.0
    ending: bool = False
    adopting: bool = False  # what happened to it before is not news, and it may go back to a snapshot
    going_back: bool = False  # it ended by itself, and is on its way back to a checkpoint
    keeping: DeferredLock = attrs.field(factory=DeferredLock, repr=False)  # a checkpoint is made, or gone back to
    setbacks: int = 0  # how often it went back since its newest checkpoint was made
    end: Once | None = attrs.field(default=None, repr=False)
    starting: list[Deferred[None]] | None = attrs.field(
        factory=list, repr=False
    )  # who waits until it is ready; or None
    watchers: list[StateUpdate] = attrs.field(factory=list, repr=False)

    @property
    def ready(self) -> bool:
        """Whether its agent has answered once, to us or to an earlier host agent."""
        return self.starting is None

    @property
    def state(self) -> MachineState:
        return self.machine.state if self.machine is not None else MachineState.DEFINED

    def last_words(self, lines: int) -> str:
        """Of its console."""
        return self.machine.console_tail(lines) if self.machine is not None else ""

    def tell(self, state: str, reason: str) -> None:
        """Those who watch it."""
        for watcher in self.watchers:
            watcher(state, reason)

    @contextmanager
    def telling_of_its_start(self, clock: IReactorTime) -> Iterator[None]:
        """Tell who waits for its agent that something goes on, and what."""
        began = clock.seconds()

        def tell() -> None:
            said = self.last_words(1).strip()[:200]
            words = f"for {clock.seconds() - began:.0f} s, and its agent has not answered yet"
            self.tell(self.state.value, f"{words}; its console says: {said}" if said else words)

        telling = LoopingCall(tell)
        telling.clock = clock
        telling.start(PROGRESS_EVERY, now=False)
        try:
            yield
        finally:
            telling.stop()

    def traffic(self) -> dict[str, int]:
        """Bytes through its way out."""
        outward = self.outward
        return {"sent_bytes": outward.sent if outward else 0, "received_bytes": outward.received if outward else 0}

    def describe(self, commands: int, now: float) -> dict[str, Any]:
        """As `docs/control.md` has it."""
        guest, machine = self.guest, self.machine
        state = self.state
        if self.going_back and state is not MachineState.RUNNING:
            state = MachineState.STARTING
        return {
            "vm": self.name,
            "instance": guest.id,
            "state": state.value,
            "agent": guest.presence.value,
            "hypervisor": self.hypervisor,
            "image": self.image.name,
            "memory_mb": self.memory_mb,
            "cpus": self.cpus,
            "pid": machine.pid if machine is not None else None,
            "cpu_s": machine.cpu_seconds() if machine is not None else 0.0,
            "paused_s": guest.stood_still(now),
            "wall_s": now - self.began,
            **self.traffic(),
            "agent_version": guest.agent_version,
            "epoch": guest.epoch,
            "load": None if guest.beacon is None else guest.beacon.load,
            "memory_used_bytes": None if guest.beacon is None else guest.beacon.memory_bytes,
            "last_seen_s": None if guest.last_seen is None else time.monotonic() - guest.last_seen,
            "commands": commands,
            "reason": self.reason,
        }

    def record(self) -> VmRecord:
        """What a successor of this host agent has to know."""
        guest = self.guest
        return VmRecord(
            instance=guest.id,
            name=self.name,
            image=str(self.image.directory),
            directory=str(self.directory),
            memory_mb=self.memory_mb,
            cpus=self.cpus,
            login=guest.identity.login,
            passcode=guest.identity.credentials.passcode,
            secret=guest.identity.secret,
            epoch=guest.epoch,
            boot=guest.boot,
            network=self.outward is not None,
        )

    def spec(
        self,
        gateway: str,
        broker: BrokerAccess,
        services: dict[int, IProtocolFactory],
        changed: Callable[[MachineState, str], None],
        *,
        boots_again: bool = True,
    ) -> MachineSpec:
        """What its hypervisor has to know. `gateway` is this host's address, as the guest sees it."""
        config = GuestConfig(
            guest=self.guest.id,
            host=broker.host,
            name=self.name,
            brokers=broker.guest_brokers(gateway, BROKER_PORT),
            credentials=self.guest.identity.credentials,
            secret=self.guest.identity.secret,
            files=f"http://{gateway}:{FILES_PORT}",
            dialect=broker.dialect,
            proxy=f"http://{gateway}:{OUTWARD_PORT}" if self.outward is not None else "",
            boots_again=boots_again,
        )
        if self.outward is not None:
            services = {**services, OUTWARD_PORT: self.outward}
        return MachineSpec(
            name=self.name,
            instance=self.guest.id,
            image=self.image,
            directory=self.directory,
            memory_mb=self.memory_mb,
            cpus=self.cpus,
            services=services,
            guest_config=config.to_json(),
            on_state=changed,
            cpu_share=self.cpu_share,
        )
