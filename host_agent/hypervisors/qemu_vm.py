"""One running QEMU: its process, its monitor, and the state that the VM is in because of them.

QEMU connects to our monitor socket. Its process belongs to a leash, which outlives us: a VM is left, and taken over by
the next host agent (`qemu_machine.py`).
"""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from twisted.internet import defer
from twisted.internet.defer import Deferred, DeferredLock, succeed
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import Factory
from twisted.logger import Logger

from common.files import write_private
from host_agent import exchange
from host_agent.ledger import LedgerEntry

from .base import Door, HypervisorError, MachineSpec, MachineState
from .cpu_time import CpuTime
from .host_line import HostLine
from .host_memory import oom_kills
from .leash import CONSOLE, CONSOLE_BYTES
from .qemu_disk import Disk
from .qemu_memory import Memory
from .qemu_options import NETWORK, TCG, MemoryFile, command_line, has_exchange
from .qemu_process import KILLED, HowItEnded
from .qemu_stuck import FOR_GOOD, accelerator_words, sentence
from .qemu_wiring import HOST_LINE, MONITOR, Process, new_process, wiring
from .qmp import QMP

START_DEADLINE = 30.0  # seconds from the start of QEMU to its first words on QMP
LEAST_SHARE = 0.05  # of the time, which a guest's agent needs to stay in touch
QUIT_DEADLINE = 5.0  # until SIGTERM, and then until SIGKILL
DISK = "disk.qcow2"
INTENT = "intent"  # a file in the VM's place, for the agent that takes it over: the state it is meant to be in

_ALIVE = (MachineState.STARTING, MachineState.RUNNING, MachineState.PAUSED)
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x09\x0b-\x1f\x7f]")


class QemuVm:
    """The part of a `base.Machine` that needs a process; `QemuMachine` adds what is on the disk."""

    _log = Logger()

    def __init__(self, reactor: Any, spec: MachineSpec, ledger: LedgerEntry | Path, grace: float) -> None:
        self.spec = spec
        self.state = MachineState.DEFINED
        self.accelerator: tuple[str, ...] = TCG
        self.gave_up: Callable[[str], None] = lambda words: None  # told when the accelerator does, with QEMU's words
        self._reactor = reactor
        self._ledger = ledger if isinstance(ledger, LedgerEntry) else None
        self._place = ledger.path if isinstance(ledger, LedgerEntry) else ledger
        self._disk = Disk(reactor, spec.directory / DISK, spec.name)
        self._memory = Memory(reactor)
        self._grace = grace
        self._wiring = wiring(reactor, self._place, spec.services, lambda: self.pid)
        self._host_line = HostLine(partial(self._wiring.listen, HOST_LINE))
        self._monitor: IListeningPort | None = None
        self._qmp: QMP | None = None
        self._ready: Deferred[None] | None = None  # QEMU answers on QMP, or has ended
        self._process: Process | None = None
        self._gone: list[Deferred[None]] = []
        self._one = DeferredLock()  # operations on states wait for each other
        self._busy = False  # one is under way: what QEMU says of pauses is its doing
        self._asked_to_end: MachineState | None = None  # the state that an end which we want leads to
        self._guest_ended = ""  # QEMU's reason in its SHUTDOWN event
        self._stuck = ""  # the run state that it never leaves
        self.given_up = ""  # what has become of such a guest, once it has ended
        self._stalled = ""  # why QEMU is about to stop the guest by itself
        self._killed_for_memory = oom_kills()  # on this host, before
        self._cpu_time = CpuTime()
        self._left = False
        self._destroying = False
        self._stopped_at = 0.0
        self._share = spec.cpu_share

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
        if self._process is not None and self._share < 1.0:
            self._process.share(self._share if on else 1.0)

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

    # -- start

    async def _launch(
        self,
        how: str,
        config: Path | None,
        *more: str,
        after: MachineState | None = None,
        memory: MemoryFile | None = None,
    ) -> QMP:
        """Start QEMU and wait until it answers. `after` is the state that an end is to lead to."""
        if self._destroying:
            raise HypervisorError(f"the VM {self.spec.name} is being removed")
        self._asked_to_end, self._guest_ended, self._stuck, self.given_up = after, "", "", ""
        self._killed_for_memory = oom_kills()
        self._intend(MachineState.STARTING)
        self._change(MachineState.STARTING, how)
        self._listen()
        if config is not None:  # now that its ports have their numbers
            write_private(config, self._wiring.settings(self.spec.guest_config))
        if has_exchange(self.spec, self.accelerator):
            exchange.make(self.spec.directory / exchange.NAME)
        argv = command_line(self.spec, self.accelerator, self._disk.path, self._wiring.wires(), config, memory)
        ready: Deferred[None] = Deferred()
        self._ready = ready
        process = self._process = new_process(self._reactor, self._place, self._ended)
        try:
            await process.start([*argv, *more], self.spec.directory, self._grace)
            if self._ledger is not None and process.pid is not None:
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
        await self._see_why_it_stands(asked=True)  # it may have run for a moment in which nobody heard of it
        if self._qmp is None or self._stuck:
            raise HypervisorError(f"the VM {self.spec.name} did not start: {self.given_up or 'it has ended'}")
        return self._qmp

    def _listen(self) -> None:
        """Everything that QEMU connects to."""
        if self._monitor is not None:
            return
        self._wiring.open()
        self._host_line.open()
        self._monitor = self._wiring.listen(MONITOR, _MonitorFactory(self))

    def monitor_connected(self, qmp: QMP) -> None:
        def ready(_: object) -> None:
            self._qmp = qmp
            waiting, self._ready = self._ready, None
            if waiting is not None:
                waiting.callback(None)

        qmp.ready.addCallbacks(ready, lambda _: None)

    def _intend(self, state: MachineState) -> None:
        """QEMU alone cannot tell a pause from a moment in which a state is written or read."""
        (self._place / INTENT).write_text(state.value)

    def _intent(self) -> MachineState:
        try:
            return MachineState((self._place / INTENT).read_text())
        except (OSError, ValueError):  # its agent died while it wrote
            return MachineState.RUNNING

    # -- what QEMU says

    def monitor_event(self, name: str, data: dict[str, Any]) -> None:
        if name == "SHUTDOWN":
            self._cpu_time.look(self.pid)  # while its process can still be asked
            self._guest_ended = str(data.get("reason", "")) if data.get("guest") else ""
        elif name == "BLOCK_IO_ERROR" and data.get("action") == "stop":
            full = "this computer's disk is full" if data.get("nospace") else "this computer's disk fails"
            self._stalled = f"{full}: {data.get('reason') or 'the guest cannot write'}"
        elif name == "STOP":
            if self._busy:
                self._stopped_at = self._reactor.seconds()
            elif self._stalled and self.state is MachineState.RUNNING:
                stalled, self._stalled = self._stalled, ""
                self._change(MachineState.PAUSED, stalled)
            seeing = Deferred.fromCoroutine(self._see_why_it_stands(asked=self._busy))
            seeing.addErrback(lambda failure: self._log.failure("{name}", failure, name=self.spec.name))
        elif name == "MIGRATION":
            self._memory.now(str(data.get("status")))
        elif self._busy:
            pass
        elif name == "RESUME" and self.state is MachineState.PAUSED:
            self._change(MachineState.RUNNING)

    async def _see_why_it_stands(self, *, asked: bool) -> None:
        """QEMU stops a guest when we ask for it, when something is in its way, and for good when it knows no way on:
        its event does not say which. `asked`: an operation of ours that does so is under way."""
        qmp = self._qmp
        try:
            status = (await self._steered().execute("query-status"))["status"]
        except HypervisorError:  # it has ended; or it hangs, which the next who asks it sees
            return
        if self._qmp is not qmp:
            return
        if status in FOR_GOOD:
            self._stuck = status
            await self._end()
        elif status != "running" and not asked and not self._busy and self.state is MachineState.RUNNING:
            self._change(MachineState.PAUSED, f"QEMU stopped the guest ({status})")

    def _ended(self, how: HowItEnded) -> None:
        self._process = self._qmp = None
        used = how.cpu_seconds if how.cpu_seconds is not None else self._cpu_time.seconds
        self._cpu_time = CpuTime()
        self._used(used)
        if self._stuck:
            self._give_up(how)
        state, words = self._how_it_ended(how)
        failure = HypervisorError(f"the VM {self.spec.name} ended" + (f": {words}" if words else ""))
        ready, self._ready = self._ready, None
        gone, self._gone = self._gone, []
        self._change(state, words)  # first: who waits for what follows looks at it at once
        if ready is not None:
            ready.errback(HypervisorError(f"the VM {self.spec.name} did not start: {words or 'it was ended'}"))
        self._memory.end(failure)
        self._host_line.ended(failure)
        for waiter in gone:
            waiter.callback(None)

    def _used(self, cpu_seconds: float) -> None:
        """A process has ended that used these."""

    def _give_up(self, how: HowItEnded) -> None:
        """It was stuck; an accelerator that brought it there is not this VM's any more."""
        self.given_up = sentence(self._stuck, self.accelerator, how.lines)
        if words := accelerator_words(self._stuck, self.accelerator, how.lines):
            self.accelerator = TCG
            self.gave_up(words)

    def _how_it_ended(self, how: HowItEnded) -> tuple[MachineState, str]:
        if self.given_up and self._asked_to_end is not MachineState.SAVED:  # which it was before
            return MachineState.CRASHED, self.given_up
        if self._asked_to_end is not None:
            return self._asked_to_end, ""
        if self._guest_ended == "guest-shutdown":
            return MachineState.STOPPED, "the guest powered itself off"
        if self._guest_ended:
            return MachineState.CRASHED, "the guest's kernel failed or restarted"
        if how.signal == KILLED and oom_kills() > self._killed_for_memory:
            return MachineState.CRASHED, "this computer ran out of memory, and its system ended QEMU"
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
            qmp = self._steered()
            self._intend(MachineState.PAUSED)
            await qmp.execute("stop")
            self._change(MachineState.PAUSED)

    def resume(self) -> Deferred[None]:
        return self._alone(self._resume)

    async def _resume(self) -> None:
        if self.state is not MachineState.RUNNING:
            qmp = self._steered()
            self._intend(MachineState.RUNNING)
            await qmp.execute("cont")
            self._host_line.say(restored=False)
            self._change(MachineState.RUNNING)

    def limit(self, cpu_share: float) -> None:
        self._share = min(1.0, max(LEAST_SHARE, cpu_share))
        if self._process is not None and self.state is MachineState.RUNNING and not self._busy:
            self._process.share(self._share)

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
            self._terminate()
        later = [
            self._reactor.callLater(QUIT_DEADLINE, self._terminate),
            self._reactor.callLater(2 * QUIT_DEADLINE, self._kill),
        ]

        def cancel(_: None) -> None:
            for call in later:
                if call.active():
                    call.cancel()

        return waiter.addCallback(cancel)

    def _terminate(self) -> None:
        if self._process is not None:
            self._process.terminate()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def destroy(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._destroy())

    async def _destroy(self) -> None:
        self._destroying = True
        await self.power_off()
        await self._alone(self._remove)  # what was under way fails now, and must not start anything after us

    async def _remove(self) -> None:
        await self.power_off()
        await self._close()
        shutil.rmtree(self.spec.directory, ignore_errors=True)
        if self._ledger is not None:
            self._ledger.close()
        self._change(MachineState.DESTROYED)

    async def _close(self) -> None:
        """Listen no more."""
        await self._wiring.close()
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
            if self._ledger is not None:
                self._ledger.release()
        elif self._ledger is not None:
            self._ledger.close()  # nothing but its directory is left on this host

    def reach(self, port: int) -> Deferred[Door]:
        """For everybody on this host, who must know its port: whatever listens there has to ask who they are."""
        return Deferred.fromCoroutine(self._reach(port))

    async def _reach(self, port: int) -> Door:
        with socket.create_server(("127.0.0.1", 0)) as free:
            ours = int(free.getsockname()[1])
        rule = f"tcp:127.0.0.1:{ours}"
        said = await self._monitor_command(f"hostfwd_add {NETWORK} {rule}-:{port}")
        if said:
            raise HypervisorError(f"QEMU lets nobody to port {port} of {self.spec.name}: {said}")

        async def close() -> None:
            if self._qmp is not None:  # else the door went with QEMU
                await self._monitor_command(f"hostfwd_remove {NETWORK} {rule}")

        return Door("127.0.0.1", ours, lambda: Deferred.fromCoroutine(close()))

    async def _monitor_command(self, line: str) -> str:
        """QMP has no words of its own for this."""
        said = await self._steered().execute("human-monitor-command", **{"command-line": line})
        return str(said or "").strip()

    # -- looking

    def cpu_seconds(self) -> float:
        """Of the process that runs now, or ran last."""
        return self._cpu_time.look(self.pid)

    def screen(self, path: Path) -> Deferred[bool]:
        if self.spec.image.kernel is not None or self._qmp is None:
            return succeed(False)
        return self._qmp.execute("screendump", filename=str(path), format="png").addCallback(lambda _: True)

    def console_tail(self, lines: int = 20) -> str:
        try:
            with (self.spec.directory / CONSOLE).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - CONSOLE_BYTES))
                data = file.read()
        except OSError:
            return ""
        text = _ESCAPES.sub("", data.decode("utf-8", "replace"))
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


class _MonitorFactory(Factory):
    noisy = False

    def __init__(self, machine: QemuVm) -> None:
        self._machine = machine

    def buildProtocol(self, addr: object) -> QMP:
        qmp = QMP(self._machine._reactor, self._machine.monitor_event)
        self._machine.monitor_connected(qmp)
        return qmp
