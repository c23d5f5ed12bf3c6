"""One QEMU VM: its life, its states on disk, and the host agents that it may outlive.

How a state is made while the guest runs: QEMU sends its memory through zstd into a file; when little is left it stops
the guest and waits. Then the disk's snapshot is taken and the caller notes what belongs to it: memory, disk and notes
are of one moment. QEMU sends the rest, the guest goes on, and what was written is read back before it counts.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
from twisted.internet import defer
from twisted.internet.defer import Deferred, DeferredLock, succeed
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import Factory
from twisted.logger import Logger

from common.files import write_private
from host_agent.ledger import LedgerEntry

from .base import SAVED, HypervisorError, MachineSpec, MachineState
from .cpu_time import CpuTime
from .guest_ports import GuestPorts
from .host_line import HostLine
from .leash import CONSOLE, CONSOLE_BYTES
from .qemu_options import GATEWAY, QEMU_IMG, TCG, command_line, program
from .qemu_process import HowItEnded, QemuProcess
from .qemu_states import ZSTD, Compressor, State, States, internal_snapshots, run_tool, sync
from .qmp import QMP

START_DEADLINE = 30.0  # seconds from the start of QEMU to its first words on QMP
STATE_DEADLINE = 300.0  # for all of a guest's memory, to the disk or from it
PAUSED_DEADLINE = 60.0  # for the part of it in which the guest stands still
TOOL_DEADLINE = 120.0  # for qemu-img
QUIT_DEADLINE = 5.0  # until SIGTERM, and then until SIGKILL
CONFIG = "guest-config.json"
DISK = "disk.qcow2"
TEMPLATE_DISK = "template.qcow2"

_ALIVE = (MachineState.STARTING, MachineState.RUNNING, MachineState.PAUSED)
_MIGRATION_ENDS = ("completed", "failed", "cancelled")


@attrs.frozen
class Clone:
    """What a VM starts from instead of a boot: the disk and the memory of a template."""

    disk: Path
    memory: Path


class QemuMachine:
    """A `base.Machine`."""

    _log = Logger()

    def __init__(
        self, reactor: Any, spec: MachineSpec, ledger: LedgerEntry | Path, states: States, grace: float
    ) -> None:
        self.spec = spec
        self.state = MachineState.DEFINED
        self.accelerator: tuple[str, ...] = TCG
        self.disk = spec.directory / DISK
        self._reactor = reactor
        self._ledger = ledger if isinstance(ledger, LedgerEntry) else None
        self._place = ledger.path if isinstance(ledger, LedgerEntry) else ledger
        self._states = states
        self._grace = grace
        self._ports = GuestPorts(reactor, self._place, spec.services)
        self._host_line = HostLine(reactor, self._place)
        self._monitor: IListeningPort | None = None
        self._qmp: QMP | None = None
        self._ready: Deferred[None] | None = None  # QEMU answers on QMP, or has ended
        self._process: QemuProcess | None = None
        self._gone: list[Deferred[None]] = []
        self._one = DeferredLock()  # operations on states wait for each other
        self._busy = False  # one is under way: what QEMU says of pauses is its doing
        self._asked_to_end: MachineState | None = None  # the state that an end which we want leads to
        self._guest_ended = ""  # QEMU's reason in its SHUTDOWN event
        self._migration = _Migration()
        self._cpu_time = CpuTime()
        self._left = False
        self._clone: Clone | None = None
        self._stopped_at = 0.0
        self.stood_still = 0.0  # seconds, of the guest during its last snapshot

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def _change(self, state: MachineState, reason: str = "") -> None:
        if state is not self.state:
            self.state = state
            self._throttle(state is MachineState.RUNNING)
            if not self._left:
                self.spec.on_state(state, reason)

    def _throttle(self, on: bool) -> None:
        """Hold it to its share of the processors; not while it starts, stands still or writes a state."""
        if self._process is not None and self.spec.cpu_share < 1.0:
            self._process.share(self.spec.cpu_share if on else 1.0)

    def _alone(self, operation: Callable[[], Any]) -> Deferred[Any]:
        """Run an operation on states when those before it have ended."""

        async def run() -> Any:
            await self._one.acquire()
            self._busy = True
            try:
                return await operation()
            finally:
                self._busy = False
                self._one.release()

        return Deferred.fromCoroutine(run())

    # -- making

    async def make_disk(self, base: Path) -> None:
        """A disk of its own over `base`, which is never written."""
        options = ("-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(self.disk))
        await self._image_tool("create", *options)

    async def make_from(self, clone: Clone) -> bool:
        """The same over a template's disk, which gets a name here: it may be removed where it is."""
        base = self.spec.directory / TEMPLATE_DISK
        try:
            try:
                base.hardlink_to(clone.disk)
            except OSError:  # another file system; it is small
                shutil.copyfile(clone.disk, base)
        except OSError as error:
            self._log.warn("{name} boots: its template is gone: {error}", name=self.spec.name, error=error)
            return False
        await self.make_disk(base)
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
        how = "emulated" if self.accelerator is TCG else "with KVM"
        if self._clone is not None and await self._start_clone(self._clone, f"from a template, {how}"):
            return
        config = self.spec.directory / CONFIG
        write_private(config, self.spec.guest_config)
        await self._launch(how, config)
        # QEMU has read the settings; nobody else on this host needs to find the secret in them.
        config.unlink(missing_ok=True)
        self._change(MachineState.RUNNING)

    async def _start_clone(self, clone: Clone, how: str) -> bool:
        """Go on from a template; on any doubt make everything ready for a boot instead."""
        self._clone = None
        try:
            qmp = await self._launch(how, None, "-incoming", "defer", "-S", after=MachineState.STARTING)
            with clone.memory.open("rb") as memory:
                await self._read_memory(qmp, memory.fileno())
            await qmp.execute("cont")
            self._host_line.say(restored=True, config=self.spec.guest_config.decode("utf-8"))
        except (HypervisorError, defer.TimeoutError, OSError) as error:
            self._log.warn("{name} boots: its template is of no use: {error}", name=self.spec.name, error=error)
            await self._end()
            await self.make_disk(self.spec.image.disk)
            return False
        self._asked_to_end = None
        self._change(MachineState.RUNNING)
        return True

    async def start_as_template(self, deadline: float) -> None:
        """Boot without settings; returns when the guest waits for them."""
        waiting = self._host_line.guest_waits().addTimeout(deadline, self._reactor)
        try:
            await self._launch("as a template", None)
            self._change(MachineState.RUNNING)
            await waiting
        except defer.TimeoutError:
            raise HypervisorError(f"its guest did not wait for its settings within {deadline:.0f} s") from None
        finally:
            waiting.addErrback(lambda _: None)
            waiting.cancel()

    async def _launch(self, how: str, config: Path | None, *more: str, after: MachineState | None = None) -> QMP:
        """Start QEMU and wait until it answers. `after` is the state that an end is to lead to."""
        self._asked_to_end, self._guest_ended = after, ""
        self._change(MachineState.STARTING, how)
        self._listen()
        forwards = self._ports.forwards(GATEWAY)
        argv = command_line(self.spec, self.accelerator, self.disk, self._place, forwards, config)
        ready: Deferred[None] = Deferred()
        self._ready = ready
        process = self._process = QemuProcess(self._reactor, self._place, self._ended)
        try:
            await process.start([*argv, *more], self.spec.directory, self._grace)
            if self._ledger is not None and process.pid is not None and process.leash_pid is not None:
                self._ledger.has_process(process.pid, process.leash_pid)
            await ready.addTimeout(START_DEADLINE, self._reactor)
        except defer.TimeoutError:
            await self.power_off()
            words = f"the VM {self.spec.name} did not start: QEMU says nothing for {START_DEADLINE:.0f} s"
            self._change(MachineState.CRASHED, words)
            raise HypervisorError(words) from None
        except HypervisorError as error:
            if process.pid is None and self.state in _ALIVE:
                self._process = None
                self._change(MachineState.CRASHED, str(error))
            raise
        assert self._qmp is not None
        return self._qmp

    def _listen(self) -> None:
        """Everything that QEMU connects to."""
        if self._monitor is not None:
            return
        self._ports.open()
        self._host_line.open()
        path = self._place / "qmp.sock"
        path.unlink(missing_ok=True)
        factory = _MonitorFactory(self)
        self._monitor = self._reactor.listenUNIX(str(path), factory, mode=stat.S_IRUSR | stat.S_IWUSR)

    def monitor_connected(self, qmp: QMP) -> None:
        def ready(_: object) -> None:
            self._qmp = qmp
            waiting, self._ready = self._ready, None
            if waiting is not None:
                waiting.callback(None)

        qmp.ready.addCallbacks(ready, lambda _: None)

    async def take_over(self) -> bool:
        """Find what an earlier host agent left; False when that is nothing."""
        if not self._place.is_dir() and not self._states:
            return False
        process = QemuProcess(self._reactor, self._place, self._ended)
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
            self._listen()
            await self._see_how_it_stands()
        elif self._states.current is not None:
            self.state = MachineState.SAVED
        self._left = False
        return self._process is not None or bool(self._states)

    async def _see_how_it_stands(self) -> None:
        self.state = MachineState.STARTING
        ready: Deferred[None] = Deferred()
        self._ready = ready
        try:
            await ready.addTimeout(START_DEADLINE, self._reactor)
            qmp = self._steered()
            status = (await qmp.execute("query-status"))["status"]
            unfinished = status in ("inmigrate", "prelaunch", "internal-error", "io-error", "guest-panicked")
            if unfinished or self._states.current is not None:
                # The agent died while it restored or saved the VM: what is on the disk is whole.
                self._asked_to_end = MachineState.SAVED if self._states.current is not None else MachineState.CRASHED
                await self._end()
                return
            if (await qmp.execute("query-migrate")).get("status") in ("active", "pre-switchover", "device", "setup"):
                await self._cancel_migration(qmp)  # a snapshot that its agent did not finish
                status = (await qmp.execute("query-status"))["status"]
            if status in ("postmigrate", "finish-migrate"):
                await qmp.execute("cont")
                status = "running"
            self.state = MachineState.PAUSED if status == "paused" else MachineState.RUNNING
            self._throttle(self.state is MachineState.RUNNING)
        except (HypervisorError, defer.TimeoutError) as error:
            self._log.warn("{name} cannot be taken over: {error}", name=self.spec.name, error=error)
            self._asked_to_end = MachineState.CRASHED
            await self._end()

    # -- what QEMU says

    def monitor_event(self, name: str, data: dict[str, Any]) -> None:
        if name == "SHUTDOWN":
            self._cpu_time.look(self.pid)  # while its process can still be asked
            self._guest_ended = str(data.get("reason", "")) if data.get("guest") else ""
        elif name == "STOP" and self._busy:
            self._stopped_at = self._reactor.seconds()
        elif name == "MIGRATION":
            self._migration.now(str(data.get("status")))
        elif self._busy:
            pass
        elif name == "STOP" and self.state is MachineState.RUNNING:
            self._change(MachineState.PAUSED)
        elif name == "RESUME" and self.state is MachineState.PAUSED:
            self._change(MachineState.RUNNING)

    def _ended(self, how: HowItEnded) -> None:
        self._process = self._qmp = None
        used = how.cpu_seconds if how.cpu_seconds is not None else self._cpu_time.seconds
        self._cpu_time = CpuTime()
        self._states.cpu_seconds += used
        try:
            self._states.write()
        except OSError as error:  # the disk is full: what is there remains
            self._log.warn("{name}: its CPU time is not kept: {error}", name=self.spec.name, error=error)
        state, words = self._how_it_ended(how)
        failure = HypervisorError(f"the VM {self.spec.name} ended" + (f": {words}" if words else ""))
        ready, self._ready = self._ready, None
        if ready is not None:
            ready.errback(HypervisorError(f"the VM {self.spec.name} did not start: {words or 'it was ended'}"))
        self._migration.end(failure)
        self._change(state, words)
        gone, self._gone = self._gone, []
        for waiter in gone:
            waiter.callback(None)

    def _how_it_ended(self, how: HowItEnded) -> tuple[MachineState, str]:
        if self._asked_to_end is not None:
            return self._asked_to_end, ""
        if self._guest_ended == "guest-shutdown":
            return MachineState.STOPPED, "the guest powered itself off"
        if self._guest_ended:
            return MachineState.CRASHED, "the guest's kernel failed or restarted"
        return MachineState.CRASHED, str(how)

    # -- steering

    def _steered(self) -> QMP:
        if self._qmp is None or self.pid is None:
            raise HypervisorError(f"the VM {self.spec.name} does not run")
        return self._qmp

    def pause(self) -> Deferred[None]:
        return self._alone(self._pause)

    async def _pause(self) -> None:
        if self.state is not MachineState.PAUSED:
            await self._steered().execute("stop")
            self._change(MachineState.PAUSED)

    def resume(self) -> Deferred[None]:
        return self._alone(self._resume)

    async def _resume(self) -> None:
        if self.state is not MachineState.RUNNING:
            await self._steered().execute("cont")
            self._host_line.say(restored=False)
            self._change(MachineState.RUNNING)

    def power_off(self) -> Deferred[None]:
        if self._asked_to_end is None or self.state in _ALIVE:
            self._asked_to_end = MachineState.STOPPED
        return self._end()

    def _end(self) -> Deferred[None]:
        """End QEMU: at once when it answers, else by signals."""
        if self.pid is None:
            return succeed(None)
        self._cpu_time.look(self.pid)
        waiter: Deferred[None] = Deferred()
        self._gone.append(waiter)
        if self._qmp is not None:
            self._qmp.execute("quit").addErrback(lambda _: None)
        else:
            self._signal(signal.SIGTERM)
        later = [
            self._reactor.callLater(QUIT_DEADLINE, self._signal, signal.SIGTERM),
            self._reactor.callLater(2 * QUIT_DEADLINE, self._signal, signal.SIGKILL),
        ]

        def cancel(_: None) -> None:
            for call in later:
                if call.active():
                    call.cancel()

        return waiter.addCallback(cancel)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.signal(number)

    def destroy(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._destroy())

    async def _destroy(self) -> None:
        await self.power_off()
        await self._close()
        shutil.rmtree(self.spec.directory, ignore_errors=True)
        if self._ledger is not None:
            self._ledger.close()
        self._change(MachineState.DESTROYED)

    async def _close(self) -> None:
        """Listen no more."""
        await self._ports.close()
        await self._host_line.close()
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            await (monitor.stopListening() or succeed(None))

    def leave(self) -> Deferred[None]:
        return self._alone(self._leave)

    async def _leave(self) -> None:
        self._left = True
        await self._close()
        if self._qmp is not None and self._qmp.transport is not None:
            self._qmp.transport.loseConnection()
        if self._process is not None:
            self._process.let_go()
            self._process = None
        elif self._ledger is not None:
            self._ledger.close()  # nothing but its directory is left on this host

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
            await self._drop_from_disk([replaced.tag])

    def snapshot(self, name: str, paused: Callable[[], None]) -> Deferred[None]:
        return self._alone(lambda: self._snapshot(name, paused))

    async def _snapshot(self, name: str, paused: Callable[[], None]) -> None:
        replaced = await self._keep(name, paused, end=False)
        if replaced is not None:
            await self._drop_from_disk([replaced.tag])

    async def _keep(self, name: str, paused: Callable[[], None], *, end: bool) -> State | None:
        """Write a state and make it count. The VM is then as before, or stands still for its `end`."""
        before = self.state
        if before not in (MachineState.RUNNING, MachineState.PAUSED):
            raise HypervisorError(f"the VM {self.spec.name} is {before.value}: its state cannot be kept")
        qmp, zstd = self._steered(), program(ZSTD)
        state = self._states.begin(name)
        path = self._states.path(state)
        self._throttle(False)
        try:
            if end and before is MachineState.RUNNING:
                await qmp.execute("stop")
            await self._write_state(qmp, zstd, state, paused, end=end)
            if not end:
                await self._as_before(qmp, before)
                self._throttle(before is MachineState.RUNNING)
            await self._check_state(zstd, path)
            return self._states.complete(state, current=end)
        except BaseException as error:
            path.unlink(missing_ok=True)
            await self._undo(state, before)
            if isinstance(error, (HypervisorError, defer.TimeoutError, OSError)) and not isinstance(error, _Refused):
                words = "it took too long" if isinstance(error, defer.TimeoutError) else str(error)
                raise HypervisorError(f"the state of {self.spec.name} cannot be kept: {words}") from None
            if isinstance(error, _Refused):
                raise error.error from None
            raise

    async def _write_state(self, qmp: QMP, zstd: str, state: State, paused: Callable[[], None], *, end: bool) -> None:
        wanted = [{"capability": name, "state": True} for name in ("pause-before-switchover", "events")]
        await qmp.execute("migrate-set-capabilities", capabilities=wanted)
        await qmp.execute("migrate-set-parameters", **{"max-bandwidth": 10 << 30})  # the disk sets the pace
        compressor, pipe = Compressor.into(self._reactor, zstd, self._states.path(state))
        try:
            try:
                await qmp.pass_descriptor("state", pipe)
            finally:
                os.close(pipe)
            self._migration.begin()
            await qmp.execute("migrate", uri="fd:state")
            await self._reaches("pre-switchover", STATE_DEADLINE)
            arguments = {"device": "disk", "name": state.tag}
            await qmp.execute("blockdev-snapshot-internal-sync", **arguments)
            try:
                paused()
            except Exception as error:
                raise _Refused(error) from None
            await qmp.execute("migrate-continue", state="pre-switchover")
            await self._reaches("completed", PAUSED_DEADLINE)
        except BaseException as error:
            compressor.kill() if not compressor.ended.called else None
            words = await compressor.ended if not isinstance(error, _Refused) else ""
            if words and isinstance(error, HypervisorError) and words.startswith("zstd"):
                raise HypervisorError(words) from None
            raise
        self._compressor = compressor

    async def _check_state(self, zstd: str, path: Path) -> None:
        """Everything is on the disk and can be read back."""
        words = await self._compressor.ended.addTimeout(STATE_DEADLINE, self._reactor)
        if words:
            raise HypervisorError(words)
        await sync(path, self.disk)
        await run_tool(self._reactor, TOOL_DEADLINE, "what was written is not sound", zstd, "-t", "-q", str(path))

    async def _reaches(self, status: str, deadline: float) -> None:
        found = await self._migration.reaches(status).addTimeout(deadline, self._reactor)
        if found != status:
            told = await self._steered().execute("query-migrate")
            raise HypervisorError(f"QEMU says: {told.get('error-desc', found)}")

    async def _as_before(self, qmp: QMP, before: MachineState) -> None:
        """After all memory was sent QEMU has let go of the disk; only `cont` takes it back."""
        await qmp.execute("cont")
        self.stood_still = self._reactor.seconds() - self._stopped_at
        if before is MachineState.PAUSED:
            await qmp.execute("stop")
        else:
            self._host_line.say(restored=False)

    async def _cancel_migration(self, qmp: QMP) -> None:
        ended = self._migration.reaches("cancelled").addTimeout(PAUSED_DEADLINE, self._reactor)
        await qmp.execute("migrate_cancel")
        if (await qmp.execute("query-migrate")).get("status") in _MIGRATION_ENDS:
            self._migration.now("cancelled")
        await ended

    async def _undo(self, state: State, before: MachineState) -> None:
        """A state was not made: the VM goes on as it was, and nothing of the attempt is left."""
        try:
            qmp = self._steered()
            if (await qmp.execute("query-migrate")).get("status") in ("setup", "active", "pre-switchover", "device"):
                await self._cancel_migration(qmp)
            status = (await qmp.execute("query-status"))["status"]
            if status in ("postmigrate", "finish-migrate"):
                await self._as_before(qmp, before)
            elif before is MachineState.RUNNING and status != "running":
                await qmp.execute("cont")
            self._throttle(before is MachineState.RUNNING)
            await self._drop_from_disk([state.tag])
        except (HypervisorError, defer.TimeoutError) as error:
            self._log.warn("{name}: after a state that was not made: {error}", name=self.spec.name, error=error)

    async def _drop_from_disk(self, tags: list[str]) -> None:
        """Remove snapshots inside the disk image; one that cannot be removed costs room and nothing else."""
        for tag in tags:
            try:
                if self._qmp is not None and self.pid is not None:
                    arguments = {"device": "disk", "name": tag}
                    await self._qmp.execute("blockdev-snapshot-delete-internal-sync", **arguments)
                else:
                    await self._image_tool("snapshot", "-q", "-d", tag, str(self.disk))
            except HypervisorError as error:
                if "not found" not in str(error) and "does not exist" not in str(error):
                    self._log.warn("{name}: {error}", name=self.spec.name, error=error)

    async def _image_tool(self, *arguments: str) -> str:
        what = f"the disk of {self.spec.name} cannot be used"
        return await run_tool(self._reactor, TOOL_DEADLINE, what, program(QEMU_IMG), *arguments)

    # -- back to a state

    def restore(self, name: str) -> Deferred[None]:
        return self._alone(lambda: self._restore(name))

    async def _restore(self, name: str) -> None:
        state = self._states.get(name)
        if state is None or self.state is MachineState.DESTROYED:
            raise HypervisorError(f"the VM {self.spec.name} has no snapshot {name}")
        self._check_size(state)
        self._asked_to_end = MachineState.STARTING
        await self._end()
        await self._start_from(state)

    def _check_size(self, state: State) -> None:
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
        self._check_size(state)
        zstd = program(ZSTD)
        tags = await internal_snapshots(self._image_tool, self.disk)
        if state.tag not in tags:
            raise HypervisorError(f"the VM {self.spec.name} cannot go back to {state.name}: its disk does not have it")
        await self._image_tool("snapshot", "-q", "-a", state.tag, str(self.disk))
        await self._drop_from_disk(self._states.stray_tags(tags))
        qmp = await self._launch(f"from {state.name}", None, "-incoming", "defer", "-S")
        compressor, pipe = Compressor.out_of(self._reactor, zstd, self._states.path(state))
        try:
            try:
                await self._read_memory(qmp, pipe)
            finally:
                os.close(pipe)
            words = await compressor.ended.addTimeout(STATE_DEADLINE, self._reactor)
            if words:
                raise HypervisorError(words)
            self._states.runs()
            await qmp.execute("cont")
            self._host_line.say(restored=True)
        except (HypervisorError, defer.TimeoutError, OSError) as error:
            compressor.kill()
            words = await compressor.ended
            self._asked_to_end = MachineState.STARTING
            await self._end()
            sentence = f"the VM {self.spec.name} cannot go back to {state.name}: {words or error}"
            self._change(MachineState.CRASHED, sentence)
            raise HypervisorError(sentence) from None
        self._change(MachineState.RUNNING)

    async def _read_memory(self, qmp: QMP, source: int) -> None:
        """Memory and devices from a descriptor, whose other end must not wait for us to close ours."""
        wanted = [{"capability": "events", "state": True}]
        await qmp.execute("migrate-set-capabilities", capabilities=wanted)
        await qmp.pass_descriptor("state", source)
        self._migration.begin()
        await qmp.execute("migrate-incoming", uri="fd:state")
        await self._reaches("completed", STATE_DEADLINE)

    def snapshots(self) -> Deferred[list[str]]:
        return succeed(self._states.names())

    def delete_snapshot(self, name: str) -> Deferred[None]:
        return self._alone(lambda: self._delete(name))

    async def _delete(self, name: str) -> None:
        if self.state is MachineState.SAVED and name == self._states.current:
            raise HypervisorError(f"the VM {self.spec.name} is saved as {name}: it would be lost")
        state = self._states.remove(name)
        if state is not None:
            await self._drop_from_disk([state.tag])

    # -- looking

    def cpu_seconds(self) -> float:
        return self._states.cpu_seconds + self._cpu_time.look(self.pid)

    def console_tail(self, lines: int = 20) -> str:
        try:
            with (self.spec.directory / CONSOLE).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - CONSOLE_BYTES))
                data = file.read()
        except OSError:
            return ""
        text = _ESCAPES.sub("", data.decode("utf-8", "replace"))
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x09\x0b-\x1f\x7f]")


class _Refused(HypervisorError):
    """The caller's own error while the guest stood still."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _Migration:
    """How far QEMU is with sending or receiving the memory, by its events."""

    def __init__(self) -> None:
        self._status = ""
        self._waiting: list[tuple[str, Deferred[str]]] = []

    def begin(self) -> None:
        self._status = ""

    def now(self, status: str) -> None:
        self._status = status
        waiting, self._waiting = self._waiting, []
        for wanted, waiter in waiting:
            if status == wanted or status in _MIGRATION_ENDS:
                if not waiter.called:
                    waiter.callback(status)
            else:
                self._waiting.append((wanted, waiter))

    def reaches(self, wanted: str) -> Deferred[str]:
        """Fires with `wanted`, or with how it ended instead."""
        waiter: Deferred[str] = Deferred()
        if self._status == wanted or self._status in _MIGRATION_ENDS:
            waiter.callback(self._status)
        else:
            self._waiting.append((wanted, waiter))
        return waiter

    def end(self, failure: HypervisorError) -> None:
        waiting, self._waiting = self._waiting, []
        for _, waiter in waiting:
            if not waiter.called:
                waiter.errback(failure)


class _MonitorFactory(Factory):
    noisy = False

    def __init__(self, machine: QemuMachine) -> None:
        self._machine = machine

    def buildProtocol(self, addr: object) -> QMP:
        qmp = QMP(self._machine._reactor, self._machine.monitor_event)
        self._machine.monitor_connected(qmp)
        return qmp
