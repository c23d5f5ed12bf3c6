"""Locks on files: the kernel gives one back when its holder dies, however it dies; the file means nothing and stays."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from common.files import runtime_dir

LEDGER_LOCK = "ledger.lock"
DEADLINE = 10.0  # seconds
LOOK_AGAIN = 0.002


def try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock on a file until it is closed; None when another has it. OSError."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


@contextlib.contextmanager
def ledger_lock() -> Iterator[None]:
    """Held for the moment in which what is ours is written down, or what a dead process left is taken.

    OSError when it is not free in time.
    """
    path, until = runtime_dir() / LEDGER_LOCK, time.monotonic() + DEADLINE
    while (handle := try_lock(path)) is None:
        if time.monotonic() >= until:
            raise TimeoutError(f"the lock {path} is not free after {DEADLINE:.0f} s")
        time.sleep(LOOK_AGAIN)
    try:
        yield
    finally:
        os.close(handle)
