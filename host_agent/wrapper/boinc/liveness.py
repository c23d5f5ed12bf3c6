"""Whether the client that started us still runs."""

from __future__ import annotations

import os
import time

from . import windows

SILENCE_S = 30.0  # without a heart-beat; only where the client did not say its process
LONGEST_STEP_S = 2.0  # counted of the time between two looks: while we, or the computer, slept nobody could beat


class Liveness:
    """The client's process where it is known, its heart-beat where it is not."""

    def __init__(self, client_pid: int) -> None:
        self._pid = client_pid
        # A parent cannot be mistaken for a later process of the same number; on Windows this number says less.
        self._is_parent = os.name == "posix" and os.getppid() == client_pid
        self._silence_s = 0.0
        self._looked = time.monotonic()

    def alive(self, beat: bool) -> bool:
        """Look now. `beat`: a heart-beat came since the last look."""
        now = time.monotonic()
        self._silence_s = 0.0 if beat else self._silence_s + min(now - self._looked, LONGEST_STEP_S)
        self._looked = now
        if self._is_parent:
            return os.getppid() == self._pid
        if self._pid:
            return process_exists(self._pid)
        return self._silence_s < SILENCE_S


def process_exists(pid: int) -> bool:
    """Whether there is such a process, of whatever user."""
    if os.name == "nt":
        return windows.process_exists(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
