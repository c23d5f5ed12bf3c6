"""An action that is done once, however many ask for it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from twisted.internet.defer import Deferred


class Once:
    """Starts `action` when it is first asked for; everybody who asks waits for the same end."""

    def __init__(self, action: Callable[[], Coroutine[Deferred[Any], Any, None]]) -> None:
        self._action = action
        self._begun = False
        self._ended = False
        self._waiting: list[Deferred[None]] = []

    def __call__(self) -> Deferred[None]:
        """Fires when the action has ended, well or not: its failures are its own to tell."""
        waiter: Deferred[None] = Deferred()
        if self._ended:
            waiter.callback(None)
            return waiter
        self._waiting.append(waiter)
        if not self._begun:
            self._begun = True
            Deferred.fromCoroutine(self._action()).addBoth(self._end)
        return waiter

    def _end(self, result: object) -> object:
        self._ended = True
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.callback(None)
        return result
