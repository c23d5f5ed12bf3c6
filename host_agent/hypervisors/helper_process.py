"""A short-lived program that does one thing for a driver: its last words are kept, and it can be killed at any time."""

from __future__ import annotations

from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IProcessTransport
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

_KEPT = 2000  # bytes of what it says


class HelperProcess(ProcessProtocol):
    """Base of the protocols of such programs."""

    transport: IProcessTransport | None
    _errors = b""

    def errReceived(self, data: bytes) -> None:
        self._errors = (self._errors + data)[-_KEPT:]

    def kill(self) -> None:
        if self.transport is not None:
            try:
                self.transport.signalProcess("KILL")
            except ProcessExitedAlready:
                pass

    @property
    def lines(self) -> list[str]:
        """What it said last on its standard error."""
        return self._errors.decode("utf-8", "replace").strip().splitlines()


def exit_status(reason: Failure) -> int | None:
    """Of `processExited` and `processEnded`; None when it was killed by a signal."""
    status: int | None = getattr(reason.value, "exitCode", None)
    return status
