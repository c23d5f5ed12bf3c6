"""Failures that may pass: they become a temporary exit with a short delay, until they have lasted too long.

A client that is told to wait a day loses a day of a volunteer's computer to a disk that was full for a minute;
one that is told nothing throws the work away. So: seconds at first, doubled each time, minutes at most.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from common.errors import VMwrapperError

from .exit_codes import Exit
from .tasks import TaskError

FIRST_DELAY_S = 15.0
LONGEST_DELAY_S = 600.0
JITTER = 0.2  # so that many jobs that failed at once do not come back at once
MOST_IN_A_ROW = 30  # about four hours; the client itself gives up after a hundred

_PASSING = {
    errno.ENOMEM: "this computer has too little free memory",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EAGAIN: "this computer runs too many processes",
    errno.EMFILE: "too many files are open",
    errno.ENFILE: "too many files are open on this computer",
    errno.ETXTBSY: "a program is still being written",
    errno.EINTR: "a call was interrupted",
    errno.EIO: "the disk does not answer",
    errno.ESTALE: "a network disk was gone for a moment",
}


def passing_errno(number: int | None) -> bool:
    """Whether an error of the operating system may be gone in a while."""
    return number in _PASSING


def passing_reason(error: BaseException) -> str:
    """Why it may help to try again in a while, as a sentence; empty: it will not."""
    if isinstance(error, MemoryError):
        return _PASSING[errno.ENOMEM]
    if isinstance(error, OSError) and error.errno in _PASSING:
        where = f" ({error.filename})" if error.filename else ""
        return f"{_PASSING[error.errno]}{where}"
    if isinstance(error, TaskError) and error.passing:
        return str(error)
    return ""


def delay_s(count: int, chance: Callable[[], float] | None = None) -> int:
    """How long the client shall wait before the start after the `count`-th failure in a row (from 1).

    `chance`: a number from 0 to 1.
    """
    delay = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(count - 1, 16))
    spread = 1 - JITTER + 2 * JITTER * (chance or _chance)()
    return round(min(LONGEST_DELAY_S, delay * spread))


def _chance() -> float:
    return int.from_bytes(os.urandom(4), "big") / (1 << 32)  # the random module would bring 4 MB of OpenSSL


def lasting_status(error: BaseException) -> Exit:
    """The exit status of a failure that did not pass."""
    memory = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if memory:
        return Exit.OUT_OF_MEMORY
    return Exit.SUB_TASK_FAILURE if isinstance(error, (VMwrapperError, OSError)) else Exit.UNKNOWN
