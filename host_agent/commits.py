"""When what the outbox has noted is flushed: once for all that came together, and what may happen only after it.

A command is on its way to its guest by then, and is answered when both are done. A disk that is quick is waited for;
one that is not, in a thread, and what comes meanwhile shares the next flush: to hand over to a thread costs 0.1 ms. A
guest is told that it may forget results (CONFIRM) a moment later, after one flush and in one message for all of that
moment.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from common.messages import Confirm

from .guests import Guest
from .outbox import Outbox

CONFIRM_AFTER = 1.0  # seconds; meanwhile guests hold the results, of which they may have thousands
CONFIRM_MOST = 256  # in one message
SLOW = 0.001  # seconds that a flush took; then the next is a thread's

Then = Callable[[OSError | None], None]
InThread = Callable[[Callable[[], None]], Deferred[None]]
Results = dict[tuple[Guest, str], list[str]]


class Commits:
    """Flushes `outbox`."""

    _log = Logger()

    def __init__(self, clock: IReactorTime, outbox: Outbox, in_thread: InThread = maybeDeferred) -> None:
        """`in_thread` runs something in another thread."""
        self._clock = clock
        self._outbox = outbox
        self._in_thread = in_thread
        self._waiting: list[Then] = []
        self._flushing = False
        self._slow = False  # as the last flush was
        self._results: Results = {}  # by guest and session
        self._timer: IDelayedCall | None = None

    def after_flush(self, then: Then) -> None:
        """Call `then` when all that is noted now survives a power cut, or with why it may not."""
        self._waiting.append(then)
        if len(self._waiting) == 1 and not self._flushing:
            self._clock.callLater(0, self._begin)

    def _begin(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        try:
            work = None
            if self._slow:
                work = self._outbox.begin_flush()
            else:
                self._timed(self._outbox.flush)
        except OSError as error:
            self._told(waiting, error)
            return
        if work is None:
            self._told(waiting, None)
            return
        self._flushing = True
        self._in_thread(partial(self._timed, work)).addCallbacks(
            lambda _: self._told(waiting, None), lambda failed: self._told(waiting, _os_error(failed))
        )

    def _timed(self, flush: Callable[[], None]) -> None:
        """Flush, and note whether the disk is slow; the way to a thread and back is not its time."""
        began = self._clock.seconds()
        try:
            flush()
        finally:
            self._slow = self._clock.seconds() - began > SLOW

    def _told(self, waiting: list[Then], failure: OSError | None) -> None:
        if failure is not None:
            self._log.error("the outbox cannot be written: {error}", error=failure)
        self._flushing = False
        for then in waiting:
            then(failure)
        self._begin()

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
        results = self._take_results()
        self.after_flush(lambda failure: self._send(results, failure))

    def _take_results(self) -> Results:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None
        results, self._results = self._results, {}
        return results

    def _send(self, results: Results, failure: OSError | None) -> None:
        if failure is not None:
            return  # the guests keep them, and say so in their next session
        for (guest, session), requests in results.items():
            if guest.session == session:
                guest.link.send(Confirm(tuple(requests)))

    def stop(self) -> None:
        """Confirm what there is to confirm, and nothing more."""
        if self._timer is not None:
            results = self._take_results()
            try:
                self._outbox.flush()
            except OSError as error:
                self._log.error("the outbox cannot be written: {error}", error=error)
            else:
                self._send(results, None)


def _os_error(failed: Failure) -> OSError:
    return failed.value if isinstance(failed.value, OSError) else OSError(0, failed.getErrorMessage())
