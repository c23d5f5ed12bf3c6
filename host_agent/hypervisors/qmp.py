"""QEMU's machine protocol: JSON objects, one a line, over QEMU's own socket."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from twisted.internet import defer
from twisted.internet.defer import Deferred, fail
from twisted.internet.interfaces import IReactorTime
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.protocols.basic import LineOnlyReceiver
from twisted.python.failure import Failure

from .base import HypervisorError, HypervisorHangs

DEADLINE = 30.0  # seconds for the answer to a command


class QMP(LineOnlyReceiver):
    """One connection. `ready` fires when commands may be sent; `on_event` gets each event's name and data."""

    delimiter = b"\n"
    MAX_LENGTH = 4 * 1024 * 1024
    _log = Logger()

    def __init__(self, clock: IReactorTime, on_event: Callable[[str, dict[str, Any]], None]) -> None:
        self._clock = clock
        self._on_event = on_event
        self._next = 1
        self._waiting: dict[int, Deferred[Any]] = {}
        self._lost = False
        self.ready: Deferred[QMP] = Deferred()

    def execute(self, command: str, **arguments: Any) -> Deferred[Any]:
        """Run a command; fires with its return value or fails with QEMU's own words."""
        if self._lost or self.transport is None:
            return fail(HypervisorError(f"QEMU cannot be asked for {command}: it has ended"))
        number, self._next = self._next, self._next + 1

        def forget(_: Deferred[Any]) -> None:
            self._waiting.pop(number, None)

        answer: Deferred[Any] = Deferred(forget)
        self._waiting[number] = answer
        request = {"execute": command, "arguments": arguments, "id": number}
        self.transport.write(json.dumps(request).encode("ascii") + b"\n")
        return answer.addTimeout(DEADLINE, self._clock).addErrback(self._late, command)

    def _late(self, failure: Failure, command: str) -> Any:
        failure.trap(HypervisorError, defer.TimeoutError)
        if failure.check(defer.TimeoutError):
            raise HypervisorHangs(f"QEMU hangs: no answer to {command} within {DEADLINE:.0f} s", "end the VM")
        return failure

    def pass_descriptor(self, name: str, descriptor: int) -> Deferred[Any]:
        """Give QEMU a copy of a descriptor, for `fd:NAME`; keep ours open until this has fired."""
        if self._lost or self.transport is None:
            return fail(HypervisorError("QEMU has ended"))
        transport: Any = self.transport
        transport.sendFileDescriptor(descriptor)
        return self.execute("getfd", fdname=name)

    def lineReceived(self, line: bytes) -> None:
        message: dict[str, Any] = json.loads(line)
        if "QMP" in message:
            negotiated = self.execute("qmp_capabilities")
            negotiated.addCallbacks(lambda _: self.ready.callback(self), self.ready.errback)
        elif "event" in message:
            self._on_event(message["event"], message.get("data", {}))
        else:
            answer = self._waiting.pop(message.get("id", 0), None)
            if answer is None:
                self._log.warn("QEMU answered what was not asked: {message}", message=str(message)[:200])
            elif "error" in message:
                answer.errback(HypervisorError(f"QEMU says: {message['error'].get('desc', 'error')}"))
            else:
                answer.callback(message.get("return"))

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._lost = True
        waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            answer.errback(HypervisorError("QEMU has ended"))
        if not self.ready.called:
            self.ready.errback(HypervisorError("QEMU has ended"))
