"""One QEMU VM with its states on disk, and the host agents that it may outlive.

How a state is made: QEMU stops the guest, the disk's snapshot is taken, QEMU writes the memory while the caller notes
what belongs to it, and the guest goes on: memory, disk and notes are of one moment. With hardware's help most of the
memory is written before the guest stands still. What was written is read back before it counts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import psutil
from twisted.internet import defer
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import deferLater

from host_agent.ledger import LedgerEntry

from .base import SAVED, HypervisorError, MachineSpec, MachineState
from .qemu_disk import TOOL_DEADLINE
from .qemu_memory import PAUSED_DEADLINE, STATE_DEADLINE, Refused
from .qemu_options import MemoryFile, accelerator_of, emulated, how_it_runs, program
from .qemu_packing import ZSTD, Compressor, Packing
from .qemu_states import State, States, run_tool, sync
from .qemu_stuck import FOR_GOOD
from .qemu_vm import START_DEADLINE, QemuVm
from .qemu_wiring import new_process
from .qmp import QMP

FINISH_POLL = 0.01  # seconds: QEMU rings no bell for it
CONFIG = "guest-config.json"
TEMPLATE_DISK = "template.qcow2"


@attrs.frozen
class Clone:
    """What a VM starts from instead of a boot: a template's disk, and what QEMU reads.

    `overlay` is an empty disk over TEMPLATE_DISK beside it. With `memory`, which QEMU maps and nobody writes, `state`
    has the devices alone; else it has both.
    """

    disk: Path
    overlay: Path
    state: Path
    memory: Path | None


class QemuMachine(QemuVm):
    """A `base.Machine`."""

    def __init__(
        self, reactor: Any, spec: MachineSpec, ledger: LedgerEntry | Path, states: States, grace: float
    ) -> None:
        super().__init__(reactor, spec, ledger, grace)
        self._states = states
        self._clone: Clone | None = None
        self.remark = ""  # on how it runs
        self.stood_still = 0.0  # seconds, of the guest during its last snapshot

    # -- making

    async def make_disk(self, base: Path) -> None:
        """A disk of its own over `base`, which is never written."""
        await self._disk.make(base)

    async def make_from(self, clone: Clone) -> bool:
        """The same over a template's disk, which gets a name here: it may be removed where it is."""
        base = self.spec.directory / TEMPLATE_DISK
        try:
            shutil.copyfile(clone.overlay, self._disk.path)
            try:
                base.hardlink_to(clone.disk)
            except OSError:  # another file system; it is small
                shutil.copyfile(clone.disk, base)
        except OSError as error:
            self._log.warn("{name} boots: its template is gone: {error}", name=self.spec.name, error=error)
            return False
        self._clone = clone
        return True

    # -- start

    def start(self) -> Deferred[None]:
        return self._alone(self._start)

    async def _start(self) -> None:
        if self.state is MachineState.RUNNING:
            return
        current = self._states.get(self._states.current or "")
        if self.state is MachineState.SAVED and current is not None:
            await self._start_from(current)
            return
        if self.state is not MachineState.DEFINED:
            raise HypervisorError(f"the VM {self.spec.name} is {self.state.value} and cannot be started")
        how = how_it_runs(self.accelerator) + self.remark
        if self._clone is not None and await self._start_clone(self._clone, f"from a template, {how}"):
            return
        config = self.spec.directory / CONFIG
        await self._launch(how, config)
        # QEMU has read the settings; nobody else on this host needs to find the secret in them.
        config.unlink(missing_ok=True)
        self._intend(MachineState.RUNNING)
        self._change(MachineState.RUNNING)

    async def _start_clone(self, clone: Clone, how: str) -> bool:
        """Go on from a template; on any doubt make everything ready for a boot instead."""
        self._clone = None
        try:
            mapped = MemoryFile(clone.memory, shared=False) if clone.memory is not None else None
            more = ("-incoming", "defer", "-S")
            qmp = await self._launch(how, None, *more, after=MachineState.STARTING, memory=mapped)
            with clone.state.open("rb") as state:
                await self._memory.read(qmp, state.fileno(), has_memory=mapped is not None)
            await qmp.execute("cont")
            self._host_line.say(restored=True, config=self.spec.guest_config.decode("utf-8"))
            self._intend(MachineState.RUNNING)
        except (HypervisorError, defer.TimeoutError, OSError) as error:
            self._log.warn("{name} boots: its template is of no use: {error}", name=self.spec.name, error=error)
            await self._end()
            await self.make_disk(self.spec.image.disk)
            return False
        self._asked_to_end = None
        self._change(MachineState.RUNNING)
        return True

    async def start_as_template(self, deadline: float, memory: Path | None) -> None:
        """Boot without settings, with `memory` as its memory; returns when the guest waits for them."""
        waiting = self._host_line.guest_waits().addTimeout(deadline, self._reactor)
        try:
            await self._launch(
                "as a template", None, memory=MemoryFile(memory, shared=True) if memory is not None else None
            )
            self._change(MachineState.RUNNING)
            await waiting
        except defer.TimeoutError:
            raise HypervisorError(f"its guest did not wait for its settings within {deadline:.0f} s") from None
        finally:
            waiting.addErrback(lambda _: None)
            waiting.cancel()

    async def end_as_template(self, devices: Path) -> None:
        """End it, with its memory in the file that it is, and all else in another."""
        qmp = self._steered()
        await qmp.execute("stop")
        with devices.open("xb") as file:
            await self._memory.write_devices(qmp, file.fileno())
        await self.power_off()

    # -- taking over

    async def take_over(self) -> bool:
        """Find what an earlier host agent left; False when that is nothing."""
        if not self._place.is_dir() and not self._states:
            return False
        process = new_process(self._reactor, self._place, self._ended)
        self.state = MachineState.CRASHED  # until something better is seen
        self._left = True  # nobody is told what was before
        self._process = process
        self._asked_to_end = MachineState.SAVED if self._states.current is not None else None
        there = await process.reattach()
        self._process = process if there and process.pid is not None else None
        self._ledger = LedgerEntry(self.spec.instance, self.spec.directory)
        self._states.remove_stray_files()
        if self._process is not None and process.pid is not None and process.leash_pid is not None:
            self._ledger.has_process(process.pid, process.leash_pid)
            with contextlib.suppress(psutil.Error):  # it has just ended
                self.accelerator = accelerator_of(psutil.Process(process.pid).cmdline()) or self.accelerator
            self._listen()
            await self._see_how_it_stands()
        elif self._states.current is not None:
            self.state = MachineState.SAVED
        self._left = False
        found = self._process is not None or bool(self._states)
        if not found:
            await self._close()
        return found

    async def _see_how_it_stands(self) -> None:
        self.state = MachineState.STARTING
        ready: Deferred[None] = Deferred()
        self._ready = ready
        try:
            await ready.addTimeout(START_DEADLINE, self._reactor)
            qmp = self._steered()
            status, intent = (await qmp.execute("query-status"))["status"], self._intent()
            self._stuck = status if status in FOR_GOOD else ""
            unfinished = status in ("inmigrate", "prelaunch", "io-error", *FOR_GOOD)
            unfinished = unfinished or (status == "paused" and intent is MachineState.STARTING)
            if unfinished or self._states.current is not None:
                # The agent died while it restored or saved the VM: what is on the disk is whole.
                self._asked_to_end = MachineState.SAVED if self._states.current is not None else MachineState.CRASHED
                await self._end()
                return
            await self._memory.cancel(qmp)  # a snapshot that its agent did not finish
            status = (await qmp.execute("query-status"))["status"]
            before = MachineState.PAUSED if intent is MachineState.PAUSED else MachineState.RUNNING
            if status in ("postmigrate", "finish-migrate"):
                await self._as_before(qmp, before)
            elif status != before.value:
                await qmp.execute("stop" if before is MachineState.PAUSED else "cont")
            self.state = before
            self._throttle(before is MachineState.RUNNING)
            self._host_line.say(restored=False)  # its connections ended with that agent: there is another now
        except (HypervisorError, defer.TimeoutError) as error:
            self._log.warn("{name} cannot be taken over: {error}", name=self.spec.name, error=error)
            self._asked_to_end = MachineState.CRASHED
            await self._end()

    # -- states

    def save_state(self) -> Deferred[None]:
        return self._alone(self._save_state)

    async def _save_state(self) -> None:
        if self.state is MachineState.SAVED:
            return
        replaced = await self._keep(SAVED, lambda: None, end=True)
        self._asked_to_end = MachineState.SAVED
        await self._end()
        if replaced is not None:
            await self._disk.drop(self._qmp, [replaced.tag])

    def snapshot(self, name: str, paused: Callable[[], None]) -> Deferred[None]:
        return self._alone(lambda: self._snapshot(name, paused))

    async def _snapshot(self, name: str, paused: Callable[[], None]) -> None:
        replaced = await self._keep(name, paused, end=False)
        if replaced is not None:
            await self._disk.drop(self._qmp, [replaced.tag])

    async def _keep(self, name: str, paused: Callable[[], None], *, end: bool) -> State | None:
        """Write a state and make it count. The VM is then as before, or stands still for its `end`."""
        before = self.state
        if before not in (MachineState.RUNNING, MachineState.PAUSED):
            raise HypervisorError(f"the VM {self.spec.name} is {before.value}: its state cannot be kept")
        qmp, zstd = self._steered(), program(ZSTD)
        state = self._states.begin(name, self.accelerator)
        path = self._states.path(state)
        # An emulated guest stands still for all of it: QEMU's note of what a running one changes is not reliable.
        live = not end and not emulated(self.accelerator)
        packing: Packing | None = None

        async def keep_disk() -> None:
            await self._disk.keep(qmp, state.tag)

        self._throttle(False)
        try:
            packing = Packing(self._reactor, zstd, path, aside_mb=0 if live or end else self.spec.memory_mb)
            if live:
                await self._memory.write_live(qmp, packing, keep_disk, paused)
            else:
                if before is MachineState.RUNNING:
                    await sync(self._disk.path)  # what was written so far: QEMU waits for it when it stops the guest
                    await qmp.execute("stop")
                await keep_disk()
                await self._memory.write(qmp, packing, paused)
            if not end:
                await self._as_before(qmp, before)
                self._throttle(before is MachineState.RUNNING)
            await self._check_state(zstd, path, packing.pack())
            return self._states.complete(state, current=end)
        except BaseException as error:
            said = await packing.give_up() if packing is not None else ""
            path.unlink(missing_ok=True)
            await self._undo(state, before)
            if isinstance(error, (HypervisorError, defer.TimeoutError, OSError)) and not isinstance(error, Refused):
                words = said or ("it took too long" if isinstance(error, defer.TimeoutError) else str(error))
                raise HypervisorError(f"the state of {self.spec.name} cannot be kept: {words}") from None
            if isinstance(error, Refused):
                raise error.error from None
            raise

    async def _check_state(self, zstd: str, path: Path, compressor: Compressor) -> None:
        """Everything is on the disk and can be read back."""
        words = await compressor.ended.addTimeout(STATE_DEADLINE, self._reactor)
        if words:
            raise HypervisorError(words)
        await sync(path, self._disk.path)
        await run_tool(self._reactor, TOOL_DEADLINE, "what was written is not sound", zstd, "-t", "-q", str(path))

    async def _as_before(self, qmp: QMP, before: MachineState) -> None:
        """After all memory was sent QEMU has let go of the disk; only `cont` takes it back."""
        until = self._reactor.seconds() + PAUSED_DEADLINE
        # QEMU says "completed" before it has put its thread for the migration away, and until then it refuses.
        while (await qmp.execute("query-status"))["status"] == "finish-migrate" and self._reactor.seconds() < until:
            await deferLater(self._reactor, FINISH_POLL)
        await qmp.execute("cont")
        self.stood_still = self._reactor.seconds() - self._stopped_at
        if before is MachineState.PAUSED:
            await qmp.execute("stop")
        else:
            self._host_line.say(restored=False)

    async def _undo(self, state: State, before: MachineState) -> None:
        """A state was not made: the VM goes on as it was, and nothing of the attempt is left."""
        try:
            qmp = self._steered()
            await self._memory.cancel(qmp)
            status = (await qmp.execute("query-status"))["status"]
            if status in ("postmigrate", "finish-migrate"):
                await self._as_before(qmp, before)
            elif before is MachineState.RUNNING and status != "running":
                await qmp.execute("cont")
            self._throttle(before is MachineState.RUNNING)
            await self._disk.drop(self._qmp, [state.tag])
        except (HypervisorError, defer.TimeoutError) as error:
            self._log.warn("{name}: after a state that was not made: {error}", name=self.spec.name, error=error)

    # -- back to a state

    def restore(self, name: str) -> Deferred[None]:
        return self._alone(lambda: self._restore(name))

    async def _restore(self, name: str) -> None:
        state = self._states.get(name)
        if state is None or self.state is MachineState.DESTROYED:
            raise HypervisorError(f"the VM {self.spec.name} has no snapshot {name}")
        self._check(state)
        self._asked_to_end = MachineState.STARTING
        await self._end()
        await self._start_from(state)

    def _check(self, state: State) -> None:
        """It is whole, and of a processor that this host can give: a guest goes on only on the one that it knows."""
        if state.accelerator and not emulated(state.accelerator) and state.accelerator != self.accelerator:
            was, now = how_it_runs(state.accelerator), how_it_runs(self.accelerator)
            sentence = f"the VM {self.spec.name} cannot go back to {state.name}"
            raise HypervisorError(f"{sentence}: it ran {was} then, and this host runs it {now} now")
        path = self._states.path(state)
        try:
            size = path.stat().st_size
        except OSError:
            size = -1
        if size != state.size:
            found = "is gone" if size < 0 else f"has {size} bytes instead of {state.size}"
            raise HypervisorError(f"the VM {self.spec.name} cannot go back to {state.name}: {path} {found}")

    async def _start_from(self, state: State) -> None:
        """Disk, then memory, and only then does the guest run."""
        self._check(state)
        self.accelerator = state.accelerator or self.accelerator  # an emulated processor is the same everywhere
        zstd = program(ZSTD)
        tags = await self._disk.tags()
        if state.tag not in tags:
            raise HypervisorError(f"the VM {self.spec.name} cannot go back to {state.name}: its disk does not have it")
        await self._disk.go_back(state.tag)
        await self._disk.drop(None, self._states.stray_tags(tags))
        qmp = await self._launch(f"from {state.name}", None, "-incoming", "defer", "-S")
        compressor, pipe = Compressor.out_of(self._reactor, zstd, self._states.path(state))
        try:
            try:
                await self._memory.read(qmp, pipe)
            finally:
                os.close(pipe)
            words = await compressor.ended.addTimeout(STATE_DEADLINE, self._reactor)
            if words:
                raise HypervisorError(words)
            self._states.runs()
            await qmp.execute("cont")
            self._host_line.say(restored=True)
            self._intend(MachineState.RUNNING)
        except (HypervisorError, defer.TimeoutError, OSError) as error:
            compressor.kill()
            words = await compressor.ended
            self._asked_to_end = MachineState.STARTING
            await self._end()
            sentence = f"the VM {self.spec.name} cannot go back to {state.name}: {words or error}"
            self._change(MachineState.CRASHED, sentence)
            raise HypervisorError(sentence) from None
        self._change(MachineState.RUNNING)

    def snapshots(self) -> Deferred[list[str]]:
        return succeed(self._states.names())

    def delete_snapshot(self, name: str) -> Deferred[None]:
        return self._alone(lambda: self._delete(name))

    async def _delete(self, name: str) -> None:
        if self.state is MachineState.SAVED and name == self._states.current:
            raise HypervisorError(f"the VM {self.spec.name} is saved as {name}: it would be lost")
        state = self._states.remove(name)
        if state is not None:
            await self._disk.drop(self._qmp, [state.tag])

    # -- looking

    def _used(self, cpu_seconds: float) -> None:
        self._states.cpu_seconds += cpu_seconds
        try:
            self._states.write()
        except OSError as error:  # the disk is full: what is there remains
            self._log.warn("{name}: its CPU time is not kept: {error}", name=self.spec.name, error=error)

    def cpu_seconds(self) -> float:
        return self._states.cpu_seconds + super().cpu_seconds()
