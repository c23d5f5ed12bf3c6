"""VMs that do not do their work any more: who notices, how long it may last, and what is kept of them.

    its agent is silent while the VM runs      SILENT_MOST after it counts as silent, then the VM is ended as failed
    its files outgrow the job's disk limit     at the next look
    its hypervisor stopped it (a full disk)    it is let go on every STALL_AGAIN; after STALL_MOST it is ended as failed

A failed VM leaves its console, and where it has one a picture of its screen, beside its directory: in the slot.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from common.files import failed_console, failed_screen

from .guests import SILENT_AFTER, Guest, Presence
from .hypervisors.base import HypervisorError, Machine, MachineState

SILENT_MOST = 120.0  # seconds, after the SILENT_AFTER that an agent may be silent
STALL_MOST = 120.0
STALL_AGAIN = 5.0
CONSOLE_LINES = 2000
CONSOLE_MOST = 64 * 1024  # bytes of a console that are kept
SCREEN_MOST = 1024 * 1024  # bytes of a picture
SCREEN_DEADLINE = 10.0  # seconds


class Watched(Protocol):
    """What there is to know of a VM here."""

    name: str
    guest: Guest
    directory: Path
    machine: Machine | None
    ending: bool
    held: bool  # somebody wants it to stand still
    disk_mb: int
    stalled: Stall | None


class Stall:
    """A VM that its hypervisor has stopped."""

    def __init__(self, reason: str, now: float) -> None:
        self.reason = reason
        self.since = self.last = now

    def again(self, now: float) -> None:
        """It was let go on, and was stopped again."""
        self.last = now


class Troubles:
    """Looks at all VMs, and ends those that fail through `fail`."""

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        vms: Callable[[], Iterable[Watched]],
        fail: Callable[[Watched, str], None],
    ) -> None:
        self._clock = clock
        self._vms = vms
        self._fail = fail
        self._watch = LoopingCall(self._look)
        self._watch.clock = clock
        self._watch.start(STALL_AGAIN, now=False)

    def stop(self) -> None:
        if self._watch.running:
            self._watch.stop()

    def stopped_by_hypervisor(self, vm: Watched, reason: str) -> None:
        """Nobody has asked for this pause."""
        now = self._clock.seconds()
        if vm.stalled is None:
            vm.stalled = Stall(reason, now)
            self._log.warn("{name} stands still: {reason}", name=vm.name, reason=reason)
        else:
            vm.stalled.again(now)

    def _look(self) -> None:
        now = self._clock.seconds()
        for vm in self._vms():
            machine = vm.machine
            if machine is None or vm.ending or vm.held:
                continue
            if machine.state is MachineState.RUNNING and vm.guest.presence is Presence.SILENT:
                silent = vm.guest.silent_for()
                if silent > SILENT_AFTER + SILENT_MOST:
                    self._fail(vm, f"it runs, but its agent has said nothing for {silent:.0f} s")
            elif vm.stalled is not None:
                self._look_at_stalled(vm, vm.stalled, machine, now)
            elif vm.disk_mb and (used := _used_mb(vm.directory)) > vm.disk_mb:
                self._fail(vm, f"its disk, states and snapshots use {used} MB, and the job may use {vm.disk_mb} MB")

    def _look_at_stalled(self, vm: Watched, stall: Stall, machine: Machine, now: float) -> None:
        if machine.state is MachineState.PAUSED and now - stall.since > STALL_MOST:
            self._fail(vm, f"{stall.reason}, for {now - stall.since:.0f} s")
        elif machine.state is MachineState.PAUSED:
            machine.resume().addErrback(lambda failure: failure.trap(HypervisorError))
        elif now - stall.last > STALL_MOST:
            vm.stalled = None


def _used_mb(directory: Path) -> int:
    """What the files of a VM take on the disk: not their length, for images have holes."""
    total = 0
    with contextlib.suppress(OSError):
        for entry in os.scandir(directory):
            with contextlib.suppress(OSError):
                if entry.is_file(follow_symlinks=False):
                    info = entry.stat(follow_symlinks=False)
                    total += info.st_blocks * 512 if hasattr(info, "st_blocks") else info.st_size
    return total >> 20


async def keep_what_is_left(clock: IReactorTime, vm: Watched, *, screen: bool) -> list[Path]:
    """Console and screen of a failed VM, in files beside its directory; those that were written."""
    kept = []
    machine = vm.machine
    if machine is None:
        return []
    if console := keep_console(vm):
        kept.append(console)
    if screen:
        new, picture = vm.directory / "screen.png", failed_screen(vm.directory.parent, vm.name)
        with contextlib.suppress(HypervisorError, OSError, defer.TimeoutError):
            taken: Deferred[bool] = machine.screen(new)
            if await taken.addTimeout(SCREEN_DEADLINE, clock) and 0 < new.stat().st_size <= SCREEN_MOST:
                new.replace(picture)
                kept.append(picture)
    return kept


def keep_console(vm: Watched) -> Path | None:
    """The end of its console alone, at once: what holds it may be removed the next moment."""
    text = vm.machine.console_tail(CONSOLE_LINES) if vm.machine is not None else ""
    if not text:
        return None
    path = failed_console(vm.directory.parent, vm.name)
    try:
        path.write_bytes(text.encode("utf-8", "replace")[-CONSOLE_MOST:] + b"\n")
    except OSError:  # the disk is full, which may be the trouble
        return None
    return path
