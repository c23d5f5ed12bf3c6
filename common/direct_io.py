"""Reading and writing past the page cache, where the system can do that: an emulated processor is ten times as fast."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator

if sys.platform == "linux":
    import fcntl

    DIRECT = os.O_DIRECT
else:
    DIRECT = 0

PAGE = 4096  # bytes; what goes past the page cache is a multiple of it, in the file and in memory
LEAST = 128 * 1024  # bytes that are worth it: each piece waits for the disk


def whole_pages(file: io.FileIO, view: memoryview) -> int:
    """How many bytes of `view` may go past the page cache at the file's position; 0: it is not worth it."""
    whole = len(view) - len(view) % PAGE
    return whole if whole >= LEAST and file.tell() % PAGE == 0 else 0


@contextlib.contextmanager
def past_the_page_cache(file: io.FileIO) -> Iterator[None]:
    """OSError with EINVAL: not on this file system, or not with memory that lies like this."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    fcntl.fcntl(file, fcntl.F_SETFL, flags | DIRECT)
    try:
        yield
    finally:
        fcntl.fcntl(file, fcntl.F_SETFL, flags)


def in_page_cache(file: io.FileIO) -> bool:
    """Whether the next bytes are there, as those are that were written a moment ago."""
    try:
        os.preadv(file.fileno(), [bytearray(1)], file.tell(), getattr(os, "RWF_NOWAIT", 0))
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system that cannot tell
    return True
