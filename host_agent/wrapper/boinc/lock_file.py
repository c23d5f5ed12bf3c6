"""`boinc_lockfile`: one application in a slot. It is a lock of the same kind as that of BOINC's own library.

The file stays when the lock is given back: who removes a lock file can remove the one that somebody else just locked.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

from . import windows
from .runtime import SlotBusyError

LOCK_FILE = "boinc_lockfile"
WAIT_S = 35.0  # an application whose client died notices it within this time
RETRY_S = 0.5


class LockFile:
    """The lock of a slot; it ends with the process too."""

    def __init__(self, slot: Path) -> None:
        self._path = slot / LOCK_FILE
        self._handle: int | None = None  # a descriptor; on Windows, a handle

    def acquire(self, wait_s: float = WAIT_S) -> None:
        """Wait for it. Raises SlotBusyError, and OSError when there can be no such file."""
        until = time.monotonic() + wait_s
        while not self._try():
            if time.monotonic() >= until:
                raise SlotBusyError(
                    "Waiting to acquire slot directory lock.  Another instance may be running.",
                    f"the file is {self._path}",
                )
            time.sleep(RETRY_S)

    def release(self) -> None:
        """Give it back; more than once does no harm."""
        handle, self._handle = self._handle, None
        if handle is not None:
            if os.name == "nt":
                windows.close(handle)
            else:
                os.close(handle)

    def _try(self) -> bool:
        if self._handle is None:
            self._handle = windows.open_alone(self._path) if os.name == "nt" else _lock_posix(self._path)
        return self._handle is not None


def _lock_posix(path: Path) -> int | None:
    import fcntl

    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o664)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.ENOSYS:  # a file system without locks: nothing to be had, as BOINC's library sees it
            return handle
        os.close(handle)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return None
        raise
    except BaseException:
        os.close(handle)
        raise
    return handle
