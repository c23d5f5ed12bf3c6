"""What the worker waits for without standing still: an operation yields one of these until it is done.

operation(): … yield Progress(p, "what", seconds) … yield Until(condition, "what", seconds) … return value
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any, Protocol

from .causes import explain
from .pyvbox import BoxError


class Pending(Protocol):
    def done(self) -> bool:
        """Look; BoxError when it failed or its time is over."""


Operation = Generator[Pending, None, Any]


class Progress:
    """One of VirtualBox's progress objects. Its failures do not raise by themselves: they are looked for here."""

    def __init__(self, progress: Any, what: str, seconds: float) -> None:
        self._progress = progress
        self._what = what
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds

    def done(self) -> bool:
        if self._progress.completed:
            if code := int(self._progress.result_code):
                raise BoxError(*explain(self._what, self._words(code)))
            return True
        if time.monotonic() < self._deadline:
            return False
        if self._progress.cancelable:
            self._progress.cancel()
        raise BoxError(f"{self._what}: VirtualBox has not finished it within {self._seconds:.0f} s")

    def _words(self, code: int) -> str:
        info = self._progress.error_info
        texts = []
        while info:
            texts.append(str(info.text))
            info = info.next_p
        return " ".join(texts) or f"status 0x{code & 0xFFFFFFFF:08x}"


class Until:
    """A condition that comes true without a progress object."""

    def __init__(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        self._condition = condition
        self._what = what
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds

    def done(self) -> bool:
        if self._condition():
            return True
        if time.monotonic() < self._deadline:
            return False
        raise BoxError(f"{self._what}: this has not happened within {self._seconds:.0f} s")
