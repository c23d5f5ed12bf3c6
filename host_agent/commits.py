"""When what the outbox has noted is flushed: once for all that came together, and what may happen only after it.

A request is sent in the reactor's next turn, after one flush for all requests of this turn. A guest is told that it
may forget results (CONFIRM) a moment later, after one flush and in one message for all of that moment.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from common.messages import Confirm

from .guests import Guest
from .outbox import Outbox

CONFIRM_AFTER = 0.25  # seconds; meanwhile guests hold the results, of which they may have thousands
CONFIRM_MOST = 256  # in one message

Then = Callable[[OSError | None], None]


class Commits:
    """Flushes `outbox`."""

    _log = Logger()

    def __init__(self, clock: IReactorTime, outbox: Outbox) -> None:
        self._clock = clock
        self._outbox = outbox
        self._requests: list[Then] = []
        self._results: dict[tuple[Guest, str], list[str]] = {}  # by guest and session
        self._timer: IDelayedCall | None = None

    def after_flush(self, then: Then) -> None:
        """Call `then` when all that is noted now survives a power cut, or with why it may not."""
        self._requests.append(then)
        if len(self._requests) == 1:
            self._clock.callLater(0, self._flush_requests)

    def _flush_requests(self) -> None:
        requests, self._requests = self._requests, []
        failure = self._flush()
        for then in requests:
            then(failure)

    def confirm(self, guest: Guest, request: str) -> None:
        """The end of a request is noted: tell the guest so, soon.

        Not in another session: there both views are put together anew, and a restored guest may run it again.
        """
        of_guest = self._results.setdefault((guest, guest.session), [])
        of_guest.append(request)
        if len(of_guest) >= CONFIRM_MOST:
            self._confirm()
        elif self._timer is None:
            self._timer = self._clock.callLater(CONFIRM_AFTER, self._confirm)

    def _confirm(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None
        results, self._results = self._results, {}
        if self._flush() is not None:
            return  # the guests keep them, and say so in their next session
        for (guest, session), requests in results.items():
            if guest.session == session:
                guest.link.send(Confirm(tuple(requests)))

    def _flush(self) -> OSError | None:
        try:
            self._outbox.flush()
        except OSError as error:
            self._log.error("the outbox cannot be written: {error}", error=error)
            return error
        return None

    def stop(self) -> None:
        """Confirm what there is to confirm, and nothing more."""
        if self._timer is not None:
            self._confirm()
