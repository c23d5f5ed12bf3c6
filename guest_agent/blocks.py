"""What a copy sends, block by block: while one is on its way, a second thread reads and hashes the next."""

from __future__ import annotations

import contextlib
import mmap
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from common import transfer
from common.checksum import SHA256
from common.errors import TransferError

if TYPE_CHECKING:
    from concurrent.futures import Future

KEPT = 2  # blocks before the one on its way, for a receiver that lost the end of what was sent


class Blocks:
    """Of the stream of a copy. `at` may be asked for any offset; within the last blocks that costs nothing."""

    def __init__(self, path: Path, manifest: transfer.Manifest, size: int, ways: tuple[str, ...] = (SHA256,)) -> None:
        # Imported late: most guests start long before their first copy.
        from concurrent.futures import ThreadPoolExecutor

        self._path = path
        self._manifest = manifest
        self._ways = ways
        self._source = transfer.Source(path, manifest, ways, direct=True)
        # Those that were given out, and the one that is filled.
        self._buffers = deque(memoryview(mmap.mmap(-1, size)) for _ in range(KEPT + 2))
        self._given: deque[tuple[int, memoryview]] = deque(maxlen=KEPT + 1)  # offset and contents
        self._reader = ThreadPoolExecutor(1)
        self._next: Future[memoryview] | None = None
        self._end = 0  # offset of the next

    def at(self, offset: int) -> memoryview:
        """The bytes from `offset` to the end of their block, none at the end of all; TransferError.

        Valid until as many more blocks are asked for as are kept.
        """
        for start, block in self._given:
            if start <= offset < start + len(block):
                return block[offset - start :]
        if offset != self._end:
            self._go_to(offset)
        future = self._next or self._begin_next()
        self._next = None
        block = future.result()
        if block:
            self._given.append((offset, block))
            self._end += len(block)
            self._begin_next()
        return block

    def _begin_next(self) -> Future[memoryview]:
        """Into the buffer of the block that has been given out for the longest."""
        buffer = self._buffers[0]
        self._buffers.rotate(-1)
        self._next = self._reader.submit(self._fill, buffer)
        return self._next

    def _fill(self, buffer: memoryview) -> memoryview:
        try:
            return buffer[: self._source.read_into(buffer)]
        except OSError as error:
            raise self._unreadable(error) from None

    def _go_to(self, offset: int) -> None:
        """Begin anew there: all that lies before is read again, because the digest needs it."""
        if self._next is not None:
            with contextlib.suppress(TransferError):
                self._next.result()
            self._next = None
        self._given.clear()
        self._source.close()
        self._source = transfer.Source(self._path, self._manifest, self._ways, direct=True)
        try:
            self._source.skip_to(offset)
        except OSError as error:
            raise self._unreadable(error) from None
        self._end = offset

    def _unreadable(self, error: OSError) -> TransferError:
        """Not an error of the network, which would be tried again."""
        return TransferError(f"{self._path} cannot be read: {error.strerror}")

    def digest(self) -> str:
        """Of the manifest and all bytes, once `at` has given the empty block."""
        return self._source.digest()

    def close(self) -> None:
        self._reader.shutdown()
        self._source.close()
