"""A hypervisor without virtual machines, whose failures are written down beforehand.

For tests of everything that must cope with hypervisors; `process.py` is the one whose guests do something.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable

import attrs
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from .base import Capabilities, HypervisorError, Machine, MachineSpec, MachineState, Requirement

_pids = itertools.count(1_000_000_000)  # above every real process


@attrs.frozen
class Script:
    """What is to go wrong with the next machines. An empty text is: it does not."""

    create_fails: str = ""
    start_fails: str = ""
    start_takes: float | None = 0.0  # seconds; None: for ever
    pause_fails: str = ""
    dies_after: float | None = None  # seconds after its start
    dies_of: str = "scripted death"
    powers_off_after: float | None = None  # seconds after its start, by the guest itself
    power_off_takes: float = 0.0
    console: str = ""


class FakeHypervisor:
    """A `base.Hypervisor`. `machines` has every machine that was made, the newest last."""

    name = "fake"
    capabilities = Capabilities()
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
        return succeed(None)


class FakeMachine:
    """A `base.Machine` that moves along the arrows of the real ones."""

    def __init__(self, clock: IReactorTime, spec: MachineSpec, script: Script) -> None:
        self.spec = spec
        self.script = script
        self.calls: list[str] = []  # what was asked of it, in order
        self._clock = clock
        self._state = MachineState.DEFINED
        self._pid: int | None = None
        self._started = 0.0
        self._cpu_seconds = 0.0
        self._pending: list[IDelayedCall] = []
        self._start: Deferred[None] | None = None
        self._snapshots: list[str] = []

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
        if self._state not in (MachineState.DEFINED, MachineState.STOPPED, MachineState.CRASHED):
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

    def leave(self) -> Deferred[None]:
        self.calls.append("leave")
        return succeed(None)

    def save_state(self) -> Deferred[None]:
        self.calls.append("save_state")
        self._pid = None
        self._change(MachineState.SAVED, "")
        return succeed(None)

    def snapshot(self, name: str, paused: Callable[[], None]) -> Deferred[None]:
        self.calls.append(f"snapshot {name}")
        paused()
        self._snapshots.append(name)
        return succeed(None)

    def restore(self, name: str) -> Deferred[None]:
        self.calls.append(f"restore {name}")
        self._change(MachineState.RUNNING, "")
        return succeed(None)

    def snapshots(self) -> Deferred[list[str]]:
        return succeed(list(self._snapshots))

    def delete_snapshot(self, name: str) -> Deferred[None]:
        self._snapshots.remove(name)
        return succeed(None)

    def cpu_seconds(self) -> float:
        """A tenth of the time that it has run."""
        if self._pid is not None:
            self._cpu_seconds = (self._clock.seconds() - self._started) / 10
        return self._cpu_seconds

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
            self.spec.on_state(state, reason)
