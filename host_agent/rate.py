"""How fast bytes may flow: what a connection has read is paid for before it reads on."""

from __future__ import annotations

from typing import Any

import attrs
from twisted.internet.interfaces import IDelayedCall, IPushProducer
from zope.interface import implementer


@attrs.define(eq=False)
class Rate:
    """Bytes per second, for all who share it; 0: no limit."""

    _clock: Any
    bytes_s: float = 0.0
    _paid: float = 0.0  # the time at which all bytes so far are paid for

    def take(self, count: int) -> float:
        """Count bytes; returns the seconds until they are paid for."""
        if not self.bytes_s:
            return 0.0
        now = float(self._clock.seconds())
        self._paid = max(self._paid, now) + count / self.bytes_s
        return self._paid - now

    def change(self, bytes_s: float) -> bool:
        """Another limit, whatever is not paid for yet; False when it is the same."""
        if bytes_s == self.bytes_s:
            return False
        self.bytes_s, self._paid = bytes_s, 0.0
        return True


@implementer(IPushProducer)
@attrs.define(eq=False)
class Tap:
    """What comes in over one transport; shut while whoever takes it is slower, and while it is not paid for."""

    _clock: Any
    _transport: Any
    _slow: bool = False
    _waiting: IDelayedCall | None = None

    def pauseProducing(self) -> None:
        self._slow = True
        self._transport.pauseProducing()

    def resumeProducing(self) -> None:
        self._slow = False
        self._read_on()

    def stopProducing(self) -> None:
        self.close()
        self._transport.stopProducing()

    def wait(self, seconds: float) -> None:
        """Read nothing for so long."""
        if seconds > 0 and self._waiting is None:
            self._transport.pauseProducing()
            self._waiting = self._clock.callLater(seconds, self.wait_no_longer)

    def wait_no_longer(self) -> None:
        self.close()
        self._read_on()

    def close(self) -> None:
        """The connection is over."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None and waiting.active():
            waiting.cancel()

    def _read_on(self) -> None:
        if not self._slow and self._waiting is None:
            self._transport.resumeProducing()
