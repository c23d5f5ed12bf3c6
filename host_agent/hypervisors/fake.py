"""A hypervisor without virtual machines, whose failures are written down beforehand.

For tests of everything that must cope with hypervisors; `process.py` is the one whose guests do something.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from .base import SAVED, Capabilities, HeldByAnother, HypervisorError, Machine, MachineSpec, MachineState, Requirement

_pids = itertools.count(1_000_000_000)  # above every real process


@attrs.frozen
class Script:
    """What is to go wrong with the next machines. An empty text is: it does not."""

    create_fails: str = ""
    start_fails: str = ""
    start_takes: float | None = 0.0  # seconds; None: for ever
    pause_fails: str = ""
    save_fails: str = ""
    snapshot_fails: str = ""
    restore_fails: str = ""
    dies_after: float | None = None  # seconds after its start
    dies_of: str = "scripted death"
    powers_off_after: float | None = None  # seconds after its start, by the guest itself
    power_off_takes: float = 0.0
    console: str = ""
    screen: bytes = b""  # empty: it has none


class FakeHypervisor:
    """A `base.Hypervisor`. `machines` has every machine that was made, the newest last."""

    name = "fake"
    capabilities = Capabilities(save_state=True, live_snapshot=True, adopt=True)
    guest_gateway = "127.0.0.1"

    def __init__(self, clock: IReactorTime, script: Script | None = None) -> None:
        self.script = script or Script()
        self.machines: list[FakeMachine] = []
        self._clock = clock

    def requirements(self) -> Deferred[list[Requirement]]:
        return succeed([Requirement("fake hypervisor", True, "nothing is needed")])

    def create(self, spec: MachineSpec) -> Deferred[Machine]:
        if self.script.create_fails:
            return fail(HypervisorError(self.script.create_fails))
        machine = FakeMachine(self._clock, spec, self.script)
        self.machines.append(machine)
        return succeed(machine)

    def adopt(self, spec: MachineSpec) -> Deferred[Machine | None]:
        """Machines outlive their agents as long as the agents share this object."""
        for machine in reversed(self.machines):
            if machine.spec.instance == spec.instance and machine.state is not MachineState.DESTROYED:
                if not machine.left:
                    return fail(HeldByAnother(f"the VM {spec.name} belongs to another host agent"))
                machine.spec, machine.left = spec, False
                return succeed(machine)
        return succeed(None)


class FakeMachine:
    """A `base.Machine` that moves along the arrows of the real ones."""

    def __init__(self, clock: IReactorTime, spec: MachineSpec, script: Script) -> None:
        self.spec = spec
        self.script = script
        self.calls: list[str] = []  # what was asked of it, in order
        self.left = False  # no agent has it; the restart of an agent that was killed sets this
        self._snapshots: list[str] = []
        self._clock = clock
        self._state = MachineState.DEFINED
        self._pid: int | None = None
        self._started = 0.0
        self._cpu_seconds = 0.0
        self._pending: list[IDelayedCall] = []
        self._start: Deferred[None] | None = None

    @property
    def state(self) -> MachineState:
        return self._state

    @property
    def pid(self) -> int | None:
        return self._pid

    def start(self) -> Deferred[None]:
        self.calls.append("start")
        if self._state is MachineState.RUNNING:
            return succeed(None)
        startable = (MachineState.DEFINED, MachineState.SAVED, MachineState.STOPPED, MachineState.CRASHED)
        if self._state not in startable:
            return fail(HypervisorError(f"{self.spec.name} is {self._state.value} and cannot be started"))
        self._change(MachineState.STARTING, "")
        self._start = Deferred()
        if self.script.start_takes is not None:
            self._later(self.script.start_takes, self._run)
        return self._start

    def _run(self) -> None:
        if self.script.start_fails:
            self._end(MachineState.CRASHED, self.script.start_fails)
            return
        self._pid = next(_pids)
        self._started = self._clock.seconds()
        self._change(MachineState.RUNNING, "")
        if self.script.dies_after is not None:
            self._later(self.script.dies_after, self._end, MachineState.CRASHED, self.script.dies_of)
        if self.script.powers_off_after is not None:
            reason = "the guest powered itself off"
            self._later(self.script.powers_off_after, self._end, MachineState.STOPPED, reason)
        start, self._start = self._start, None
        if start is not None:
            start.callback(None)

    def die(self, reason: str = "scripted death") -> None:
        """End now, not as asked."""
        self._end(MachineState.CRASHED, reason)

    def pause(self) -> Deferred[None]:
        return self._switch("pause", MachineState.RUNNING, MachineState.PAUSED)

    def resume(self) -> Deferred[None]:
        return self._switch("resume", MachineState.PAUSED, MachineState.RUNNING)

    def _switch(self, what: str, before: MachineState, after: MachineState) -> Deferred[None]:
        self.calls.append(what)
        if self._state is after:
            return succeed(None)
        if self._state is not before:
            return fail(HypervisorError(f"{self.spec.name} is {self._state.value}, not {before.value}"))
        if self.script.pause_fails:
            return fail(HypervisorError(self.script.pause_fails))
        self._change(after, "")
        return succeed(None)

    def save_state(self) -> Deferred[None]:
        self.calls.append("save_state")
        if self._state is MachineState.SAVED:
            return succeed(None)
        if failure := self._unable("saved", self.script.save_fails):
            return failure
        self._snapshots = [other for other in self._snapshots if other != SAVED] + [SAVED]
        self._end(MachineState.SAVED, "")
        return succeed(None)

    def snapshot(self, name: str, paused: Callable[[], None]) -> Deferred[None]:
        self.calls.append(f"snapshot {name}")
        if failure := self._unable("kept as a snapshot", self.script.snapshot_fails):
            return failure
        try:
            paused()
        except Exception:
            return fail()
        self._snapshots = [other for other in self._snapshots if other != name] + [name]
        return succeed(None)

    def restore(self, name: str) -> Deferred[None]:
        self.calls.append(f"restore {name}")
        if self._state is MachineState.DESTROYED or name not in self._snapshots:
            return fail(HypervisorError(f"{self.spec.name} has no snapshot {name}"))
        if self.script.restore_fails:
            return fail(HypervisorError(self.script.restore_fails))
        self._end(MachineState.STARTING, "")
        self._change(MachineState.STARTING, "")
        self._pid, self._started = next(_pids), self._clock.seconds()
        self._change(MachineState.RUNNING, "")
        return succeed(None)

    def snapshots(self) -> Deferred[list[str]]:
        return succeed(list(self._snapshots))

    def delete_snapshot(self, name: str) -> Deferred[None]:
        self.calls.append(f"delete_snapshot {name}")
        self._snapshots = [other for other in self._snapshots if other != name]
        return succeed(None)

    def leave(self) -> Deferred[None]:
        self.calls.append("leave")
        self.left = True
        return succeed(None)

    def _unable(self, done: str, scripted: str) -> Deferred[Any] | None:
        """Why something that needs a living VM cannot be done now."""
        if self._state not in (MachineState.RUNNING, MachineState.PAUSED):
            return fail(HypervisorError(f"{self.spec.name} is {self._state.value} and cannot be {done}"))
        return fail(HypervisorError(scripted)) if scripted else None

    def limit(self, cpu_share: float) -> None:
        self.calls.append(f"limit {cpu_share:g}")

    def power_off(self) -> Deferred[None]:
        self.calls.append("power_off")
        if self._state not in (MachineState.STARTING, MachineState.RUNNING, MachineState.PAUSED):
            return succeed(None)
        self._forget()
        gone: Deferred[None] = Deferred()

        def end() -> None:
            self._end(MachineState.STOPPED, "powered off")
            gone.callback(None)

        self._later(self.script.power_off_takes, end)
        return gone

    def destroy(self) -> Deferred[None]:
        self.calls.append("destroy")

        def clean(_: object) -> None:
            self._forget()
            shutil.rmtree(self.spec.directory, ignore_errors=True)
            self._change(MachineState.DESTROYED, "")

        return self.power_off().addCallback(clean)

    def cpu_seconds(self) -> float:
        """A tenth of the time that it has run."""
        if self._pid is not None:
            now = self._clock.seconds()
            self._cpu_seconds += (now - self._started) / 10
            self._started = now
        return self._cpu_seconds

    def screen(self, path: Path) -> Deferred[bool]:
        if self.script.screen:
            path.write_bytes(self.script.screen)
        return succeed(bool(self.script.screen))

    def stall(self, reason: str) -> None:
        """The hypervisor stops the VM by itself."""
        self._change(MachineState.PAUSED, reason)

    def console_tail(self, lines: int = 20) -> str:
        return "\n".join(self.script.console.splitlines()[-lines:]) if lines > 0 else ""

    def _end(self, state: MachineState, reason: str) -> None:
        if self._state not in (MachineState.STARTING, MachineState.RUNNING, MachineState.PAUSED):
            return
        self.cpu_seconds()
        self._pid = None
        self._forget()
        self._change(state, reason)
        start, self._start = self._start, None
        if start is not None:
            start.errback(HypervisorError(f"the VM {self.spec.name} did not start: {reason}"))

    def _later(self, seconds: float, call: object, *arguments: object) -> None:
        self._pending.append(self._clock.callLater(seconds, call, *arguments))  # type: ignore[arg-type]

    def _forget(self) -> None:
        pending, self._pending = self._pending, []
        for call in pending:
            if call.active():
                call.cancel()

    def _change(self, state: MachineState, reason: str) -> None:
        if state is not self._state:
            self._state = state
            if not self.left:
                self.spec.on_state(state, reason)
