"""Calls to the worker (`worker.py`): each has a deadline, and none can hold the reactor up.

A call that does not come back costs the worker its life: the process is killed, everything that waits for it fails
with a sentence, and the next call starts another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import attrs
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IDelayedCall, IProcessTransport
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from ..base import HypervisorError
from .one_call import worker_argv, worker_environment
from .worker import SERVICE_LOST

RECONNECT = 2.0  # seconds until a lost worker with watched machines is replaced

LOST = "Lost"  # our name for the state of a machine whose service ended while it ran

News = Callable[[str, int | None], None]  # VirtualBox's name of the state, process


@attrs.define(eq=False)
class _Waiting:
    worker: _Worker
    call: str
    answer: Deferred[Any]
    late: IDelayedCall


class Calls:
    """What a driver asks of VirtualBox. One worker at a time, started when it is needed."""

    _log = Logger()

    def __init__(self, reactor: Any, environment: Mapping[str, str] | None = None) -> None:
        self._reactor = reactor
        self._environment = dict(os.environ if environment is None else environment)
        self._worker: _Worker | None = None
        self._waiting: dict[int, _Waiting] = {}
        self._watched: dict[str, News] = {}
        self._next = 1
        self._again: IDelayedCall | None = None
        self._processes: set[_Worker] = set()  # every worker whose process has not ended yet
        self._without_service: set[str] = set()  # machines that were watched when VirtualBox's service ended
        self._idle: list[Deferred[None]] = []

    @property
    def pid(self) -> int | None:
        """The worker's process, for those who measure it."""
        return self._worker.pid if self._worker is not None else None

    def call(self, call: str, deadline: float, **arguments: Any) -> Deferred[Any]:
        """Ask; fires with the answer, or fails with a sentence. After `deadline` seconds it fails in any case."""
        try:
            worker = self._started()
        except OSError as error:
            return fail(HypervisorError(f"the process for VirtualBox cannot be started: {error.strerror}"))
        number, self._next = self._next, self._next + 1
        answer: Deferred[Any] = Deferred()
        late = self._reactor.callLater(deadline, self._late, number, deadline)
        self._waiting[number] = _Waiting(worker, call, answer, late)
        worker.write({"id": number, "call": call, "arguments": arguments})
        return answer

    def watch(self, machine: str, news: News) -> None:
        """Tell of every change of a machine's state from now on, the present one first."""
        self._watched[machine] = news
        self._rewatch([machine])

    def forget(self, machine: str) -> None:
        if self._watched.pop(machine, None) is not None and self._worker is not None:
            self._worker.write({"id": 0, "call": "forget", "arguments": {"machine": machine}})

    def _rewatch(self, machines: list[str]) -> None:
        worker = self._started()
        for machine in machines:
            worker.write({"id": 0, "call": "watch", "arguments": {"machine": machine}})

    def _started(self) -> _Worker:
        if self._worker is None:
            worker = _Worker(self)
            argv = worker_argv()
            self._reactor.spawnProcess(worker, argv[0], argv, env=worker_environment(self._environment))
            self._worker = worker
            self._processes.add(worker)
        return self._worker

    def _late(self, number: int, deadline: float) -> None:
        waiting = self._waiting.pop(number)
        waiting.worker.kill()
        if waiting.worker is self._worker:
            self._worker = None  # the next call starts another
        sentence = f"VirtualBox did not answer within {deadline:.0f} s ({waiting.call.replace('_', ' ')})"
        waiting.answer.errback(HypervisorError(sentence, "does `VBoxManage list vms` answer? If not, end VBoxSVC"))

    # -- what the worker says

    def answered(self, worker: _Worker, message: dict[str, Any]) -> None:
        if "machine" in message:
            machine, state = message["machine"], message["state"]
            if machine in self._without_service:
                self._without_service.discard(machine)
                # Its service has ended, and came back without a memory of what ran: nobody powered it off.
                state = LOST if state == "PoweredOff" else state
            news = self._watched.get(machine)
            if news is not None:
                news(state, message["pid"])
            return
        waiting = self._waiting.pop(message["id"], None)
        if waiting is None:
            return
        waiting.late.cancel()
        if message.get("lost") and worker is self._worker:
            self._worker = None  # it is about to end: the next call starts another
        if "error" in message:
            waiting.answer.errback(HypervisorError(message["error"], message["hint"]))
        else:
            waiting.answer.callback(message["result"])

    def ended(self, worker: _Worker, words: str, *, service_lost: bool) -> None:
        if worker is self._worker:
            self._worker = None
        for number, waiting in list(self._waiting.items()):
            if waiting.worker is not worker:
                continue
            del self._waiting[number]
            waiting.late.cancel()
            sentence = f"the process for VirtualBox has ended ({waiting.call.replace('_', ' ')})"
            waiting.answer.errback(HypervisorError(f"{sentence}: {words}" if words else sentence))
        self._processes.discard(worker)
        if not self._processes:
            idle, self._idle = self._idle, []
            for waiter in idle:
                waiter.callback(None)
        if service_lost:
            self._without_service.update(self._watched)
        if self._watched and self._again is None:
            self._log.warn("the process for VirtualBox has ended and is started again: {words}", words=words)
            self._again = self._reactor.callLater(RECONNECT, self._reconnect)

    def _reconnect(self) -> None:
        self._again = None
        if self._watched:
            self._rewatch(list(self._watched))

    def close(self) -> Deferred[None]:
        """End the worker; fires when its process, and every one before it, is gone."""
        self._watched.clear()
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if not self._processes:
            return succeed(None)
        idle: Deferred[None] = Deferred()
        self._idle.append(idle)
        for worker in self._processes:
            worker.end()
        return idle


class _Worker(ProcessProtocol):
    """One worker process."""

    END_DEADLINE = 5.0  # seconds for it to end when its input has

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._buffer = b""
        self._errors = b""
        self._killer: IDelayedCall | None = None
        self._process: IProcessTransport | None = None

    @property
    def pid(self) -> int | None:
        pid: int | None = getattr(self._process, "pid", None)
        return pid

    def makeConnection(self, process: IProcessTransport) -> None:
        self._process = process

    def write(self, message: dict[str, Any]) -> None:
        if self._process is not None:
            self._process.writeToChild(0, json.dumps(message).encode() + b"\n")

    def outReceived(self, data: bytes) -> None:
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self._calls.answered(self, json.loads(line))

    def errReceived(self, data: bytes) -> None:
        self._errors = (self._errors + data)[-4000:]

    def kill(self) -> None:
        if self._process is not None:
            try:
                self._process.signalProcess("KILL")
            except ProcessExitedAlready:
                pass

    def end(self) -> None:
        if self._process is not None:
            self._process.closeStdin()
            self._killer = self._calls._reactor.callLater(self.END_DEADLINE, self.kill)

    def processEnded(self, reason: Failure) -> None:
        if self._killer is not None and self._killer.active():
            self._killer.cancel()
        lines = self._errors.decode("utf-8", "replace").strip().splitlines()
        lost = getattr(reason.value, "exitCode", None) == SERVICE_LOST
        self._calls.ended(self, lines[-1] if lines else "", service_lost=lost)
