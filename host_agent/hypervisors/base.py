"""The interface between the host agent and a hypervisor: one `Hypervisor` per program, one `Machine` per VM.

A driver knows virtual hardware and nothing else: not the broker, not commands, not job.xml.
What it can do is data (`Capabilities`), so that no caller asks which driver it has.
Every method that waits returns a Deferred, has a deadline of its own and fails with `HypervisorError`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IProtocolFactory

from common.errors import VMwrapperError

from .images import Image

SAVED = "saved"  # the name under which `Machine.save_state` keeps the state


class HypervisorError(VMwrapperError):
    """The hypervisor could not do what was asked; the sentence carries its own words."""


class HeldByAnother(HypervisorError):
    """The VM is a living host agent's: nothing of it may be touched."""


class HypervisorHangs(HypervisorError):
    """It does not answer."""


class MachineState(enum.Enum):
    """Where a VM stands. `Machine` moves only along the arrows of `docs/architecture.md`."""

    DEFINED = "defined"  # its files exist, nothing runs
    STARTING = "starting"  # the hypervisor was started, the guest is not yet running
    RUNNING = "running"
    PAUSED = "paused"  # in memory, its processors stand still
    SAVED = "saved"  # memory and devices are on the disk, nothing runs
    STOPPED = "stopped"  # ended as asked: powered off by us or by the guest
    CRASHED = "crashed"  # ended by itself, not as asked
    DESTROYED = "destroyed"  # nothing of it is left


@attrs.frozen
class Capabilities:
    """What a driver can do."""

    pause: bool = True
    save_state: bool = False  # Machine.save_state, and start from SAVED
    live_snapshot: bool = False  # Machine.snapshot, restore and delete_snapshot
    clone_from_template: bool = False
    image: bool = True  # its VMs are made from guest images
    adopt: bool = False  # a VM outlives its host agent for a while, and the next one can take it over
    boots_again: bool = True  # a guest may start anew from the disk that its failed kernel, or a power cut, left


@attrs.frozen
class Requirement:
    """One thing that a host needs for this hypervisor, as `vmctl doctor` shows it."""

    name: str
    met: bool
    found: str  # what is there: a version, a path, or what is wrong
    remedy: str = ""  # what to do when it is not met
    fatal: bool = True  # without it no VM can run (else: only slower or poorer)


@attrs.frozen
class MachineSpec:
    """Everything a driver needs to make one VM.

    `services` maps a TCP port, as seen from the guest at `Hypervisor.guest_gateway`, to the factory
    that serves it. They are the only things that the guest can reach.
    """

    name: str  # the name people use: the job's <virtualmachine>
    instance: str  # unique for ever; names files, sockets and the ledger entry
    image: Image
    directory: Path  # this VM's own directory (overlay, console); exists, mode 0700
    memory_mb: int
    cpus: int
    services: Mapping[int, IProtocolFactory]
    guest_config: bytes  # delivered to this guest alone, never through argv; at most 64 KiB
    on_state: Callable[[MachineState, str], None] = attrs.field(repr=False)  # new state, reason
    cpu_share: float = 1.0  # of the time that its processors may run; drivers that cannot hold it run as ever


class Machine(Protocol):
    """One VM. Methods may be called again after they succeeded: doing a thing twice is doing it once."""

    spec: MachineSpec

    @property
    def state(self) -> MachineState: ...

    @property
    def pid(self) -> int | None:
        """Process that carries the VM, or None when none runs."""

    def start(self) -> Deferred[None]:
        """From DEFINED or SAVED. Fires when the guest's processors run (not yet when its agent answers)."""

    def pause(self) -> Deferred[None]: ...

    def resume(self) -> Deferred[None]:
        """PAUSED to RUNNING. The guest's clock is then set to the host's, where its image allows."""

    def limit(self, cpu_share: float) -> None:
        """Hold it to this share of the time from now on, where the driver can; 1.0 is no limit."""

    def power_off(self) -> Deferred[None]:
        """End the VM at once, as if its power were cut. Fires when its process is gone."""

    def destroy(self) -> Deferred[None]:
        """Power off if needed and remove every file, socket and registration of this VM."""

    def leave(self) -> Deferred[None]:
        """Let go of the VM without ending it: this host agent ends, and its successor adopts it in the grace time.

        Nothing else may be called afterwards; `on_state` stays silent.
        """

    def save_state(self) -> Deferred[None]:
        """Memory and devices to the disk, RUNNING or PAUSED to SAVED. Fires when the VM's process is gone.

        When it fails the VM is what it was before, and an earlier saved state is untouched. After the next start the
        state remains, as a snapshot of the name `SAVED`.
        """

    def snapshot(self, name: str, paused: Callable[[], None]) -> Deferred[None]:
        """Keep memory and disk of a RUNNING or PAUSED VM as they are now; the guest goes on afterwards.

        `paused` is called while the guest stands still: what is noted there belongs to the snapshot. The guest waits
        for it, so it must be quick; when it raises, there is no snapshot. A snapshot of that name is replaced only
        when the new one is whole and on the disk.
        """

    def restore(self, name: str) -> Deferred[None]:
        """Back to a snapshot, from any state but DESTROYED. Fires when the guest runs again.

        Meanwhile it is STARTING. All connections of the guest are broken.
        """

    def snapshots(self) -> Deferred[list[str]]:
        """The names of the snapshots that can be restored, the oldest first."""

    def delete_snapshot(self, name: str) -> Deferred[None]:
        """Remove it; also when there is none."""

    def cpu_seconds(self) -> float:
        """CPU time that the VM has used on the host since it was made, in seconds."""

    def screen(self, path: Path) -> Deferred[bool]:
        """Write a picture of the guest's screen (PNG) to a file; False when it has none. May fail."""

    def console_tail(self, lines: int = 20) -> str:
        """The last lines of the guest's console, printable characters only."""


@attrs.frozen
class Door:
    """A way from this host to a port of a guest, open until `close`."""

    address: str
    port: int
    close: Callable[[], Deferred[None]]


@runtime_checkable
class Reachable(Protocol):
    """A `Machine` whose driver can open a door to its guest, which otherwise nobody reaches."""

    def reach(self, port: int) -> Deferred[Door]: ...


@runtime_checkable
class Remembering(Protocol):
    """A `Hypervisor` whose driver keeps what it has found out about this host, for the host agents to come."""

    def look_anew(self) -> None:
        """The next look at the requirements counts on nothing of that, and its finding takes the place of it."""


class Hypervisor(Protocol):
    """A program on this host that runs VMs."""

    name: str
    capabilities: Capabilities
    guest_gateway: str  # the address at which guests see their services

    def requirements(self) -> Deferred[list[Requirement]]:
        """Look at this host; never fails."""

    def create(self, spec: MachineSpec) -> Deferred[Machine]:
        """Make the VM's files (copy-on-write over the image, which stays untouched) and return it DEFINED."""

    def adopt(self, spec: MachineSpec) -> Deferred[Machine | None]:
        """Take over the VM that an earlier host agent made from this spec: RUNNING, PAUSED or SAVED.

        A VM that ended without an agent but has snapshots is given as STOPPED or CRASHED: it can be restored.
        None: nothing of it is there any more, and whatever it had on this host has been removed.
        Fails while another agent has it. `on_state` tells only what happens afterwards.
        """
