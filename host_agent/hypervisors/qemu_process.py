"""A QEMU process that outlives the host agent: started by a leash (`leash.py`), steered through its socket."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import UNIXClientEndpoint, connectProtocol
from twisted.internet.error import ConnectError
from twisted.internet.protocol import connectionDone
from twisted.protocols.basic import LineOnlyReceiver
from twisted.python.failure import Failure

from host_agent.programs import lean_argv

from .base import HypervisorError
from .helper_process import HelperProcess, exit_status
from .leash import SOCKET
from .process_end import process_end

PROGRAM = Path(__file__).with_name("leash.py")
KILLED = 9  # the number of SIGKILL, which Windows' Python does not name
DEADLINE = 30.0  # seconds for the leash to start, and to answer
TRIES_AGAIN = "Unable to connect character device"  # QEMU, while no host agent is there: no cause of its end


@attrs.frozen
class HowItEnded:
    """`signal` or `status`, QEMU's last words, and the CPU time that it used in all, in seconds."""

    status: int
    signal: int
    errors: str
    cpu_seconds: float | None

    def __str__(self) -> str:
        lines = self.lines
        how = f"QEMU was killed by signal {self.signal}" if self.signal else f"QEMU ended with status {self.status}"
        return f"{how}: {lines[-1]}" if lines else how

    @property
    def lines(self) -> list[str]:
        """What it said that has to do with its end."""
        return [line for line in self.errors.strip().splitlines() if TRIES_AGAIN not in line]


class QemuProcess:
    """One QEMU. `on_end` is called once, when it has ended, unless it was let go before."""

    def __init__(self, reactor: Any, place: Path, on_end: Callable[[HowItEnded], None]) -> None:
        self._reactor = reactor
        self._place = place
        self._on_end: Callable[[HowItEnded], None] | None = on_end
        self._line: _Line | None = None
        self.pid: int | None = None
        self.leash_pid: int | None = None

    def start(self, argv: list[str], directory: Path, grace: float) -> Deferred[None]:
        """Fires when QEMU was started (not when it has come far)."""
        words = [str(self._place), str(directory), str(grace), *argv]
        return Deferred.fromCoroutine(self._start(b"".join(os.fsencode(word) + b"\0" for word in words)))

    async def _start(self, settings: bytes) -> None:
        starter = _Starter(settings)
        command = lean_argv(PROGRAM, "host_agent.hypervisors.leash")
        self._reactor.spawnProcess(starter, command[0], command, env=None)
        try:
            await starter.started.addTimeout(DEADLINE, self._reactor)
        except defer.TimeoutError:
            starter.kill()
            raise HypervisorError(f"the leash of a VM did not start within {DEADLINE:.0f} s") from None
        if not await self.reattach():
            raise HypervisorError("the leash of a VM ended at once", "look for its reason in the system's log")

    def reattach(self) -> Deferred[bool]:
        """Connect to the leash; False when there is none. When QEMU has ended already `on_end` is called."""
        return Deferred.fromCoroutine(self._reattach())

    async def _reattach(self) -> bool:
        line = _Line(self._heard, self._lost)
        endpoint = UNIXClientEndpoint(self._reactor, str(self._place / SOCKET), timeout=DEADLINE)
        try:
            await connectProtocol(endpoint, line)
        except ConnectError:
            return False
        try:
            hello = await line.hello.addTimeout(DEADLINE, self._reactor)
        except defer.TimeoutError:
            line.close()
            raise HypervisorError(f"the leash of a VM does not answer within {DEADLINE:.0f} s") from None
        if "busy" in hello:
            raise HypervisorError("another host agent has this VM", "end that agent first")
        if not hello:
            return False
        self._line = line
        self.pid, self.leash_pid = hello["process"] or None, hello["leash"]
        line.listen()
        return True

    def _heard(self, message: dict[str, Any]) -> None:
        if "ended" in message:
            self._end(HowItEnded(**message["ended"]))
            if self._line is not None:
                self._line.say(done=True)

    def _lost(self) -> None:
        self._line = None
        if self.pid is not None:
            # It is QEMU's parent, and QEMU is killed with it (by us, where the system does not do it); until it is gone
            # its disk is locked.
            if sys.platform != "linux":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
            how = HowItEnded(0, KILLED, "its leash was killed", None)
            gone = process_end(self._reactor, self.pid).addTimeout(DEADLINE, self._reactor)
            gone.addBoth(lambda _: self._end(how))

    def _end(self, how: HowItEnded) -> None:
        self.pid = None
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end(how)

    def signal(self, number: signal.Signals) -> None:
        if self._line is not None and self.pid is not None:
            self._line.say(signal=int(number))

    def terminate(self) -> None:
        self.signal(signal.SIGTERM)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def share(self, share: float) -> None:
        """Of the time, that QEMU may run; 1 is no limit."""
        if self._line is not None and self.pid is not None:
            self._line.say(share=share)

    def let_go(self) -> None:
        """Leave QEMU to the leash, and to the next agent."""
        self._on_end = None
        if self._line is not None:
            self._line.close()


class _Starter(HelperProcess):
    """The leash's first process, which ends when the leash can be connected to."""

    def __init__(self, settings: bytes) -> None:
        self._settings = settings
        self.started: Deferred[None] = Deferred()

    def connectionMade(self) -> None:
        assert self.transport is not None
        self.transport.writeToChild(0, self._settings)
        self.transport.closeStdin()

    def processExited(self, reason: Failure) -> None:
        if self.started.called:
            return
        if exit_status(reason) == 0:
            self.started.callback(None)
        else:
            words = (self.lines or [reason.getErrorMessage()])[-1]
            self.started.errback(HypervisorError(f"the leash of a VM did not start: {words}"))


class _Line(LineOnlyReceiver):
    """The connection to a leash. What comes after its first line waits until `listen`."""

    delimiter = b"\n"
    MAX_LENGTH = 64 * 1024

    def __init__(self, heard: Callable[[dict[str, Any]], None], lost: Callable[[], None]) -> None:
        self._to, self._lost = heard, lost
        self._early: list[dict[str, Any]] | None = []
        self._closed = False
        self.hello: Deferred[dict[str, Any]] = Deferred()

    def lineReceived(self, line: bytes) -> None:
        message: dict[str, Any] = json.loads(line)
        if not self.hello.called:
            self.hello.callback(message)
        elif self._early is not None:
            self._early.append(message)
        else:
            self._to(message)

    def listen(self) -> None:
        early, self._early = self._early, None
        for message in early or []:
            self._to(message)

    def say(self, **message: Any) -> None:
        if self.transport is not None:
            self.transport.write(json.dumps(message).encode("ascii") + b"\n")

    def close(self) -> None:
        self._closed = True
        if self.transport is not None:
            self.transport.loseConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if not self.hello.called:
            self.hello.callback({})
        elif not self._closed:
            self._lost()
