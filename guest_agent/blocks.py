"""What a copy sends, block by block: while one is on its way, a second thread reads and hashes the next."""

from __future__ import annotations

import contextlib
import mmap
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from common import transfer
from common.errors import TransferError

if TYPE_CHECKING:
    from concurrent.futures import Future


class Blocks:
    """Of the stream of a copy. `at` may be asked for any offset; going on, or asking again, costs nothing more."""

    def __init__(self, path: Path, manifest: transfer.Manifest, size: int) -> None:
        # Imported late: most guests start long before their first copy.
        from concurrent.futures import ThreadPoolExecutor

        self._path = path
        self._manifest = manifest
        self._source = transfer.Source(path, manifest, direct=True)
        self._buffers = deque(memoryview(mmap.mmap(-1, size)) for _ in range(2))
        self._reader = ThreadPoolExecutor(1)
        self._next: Future[int] | None = None  # how many bytes are in the first buffer
        self._offset = 0
        self._block = self._buffers[0][:0]  # what is on its way; in the last buffer

    def at(self, offset: int) -> memoryview:
        """The block that begins at `offset`, empty at the end; valid until the next one is asked for. TransferError."""
        if offset == self._offset + len(self._block):
            self._offset, self._block = offset, self._read_next()
        elif offset != self._offset:
            self._end_reading()
            self._source.close()
            self._source = transfer.Source(self._path, self._manifest, direct=True)
            try:
                self._source.skip_to(offset)
            except OSError as error:
                raise self._unreadable(error) from None
            self._offset, self._block = offset, self._read_next()
        return self._block

    def _read_next(self) -> memoryview:
        future = self._next or self._reader.submit(self._fill, self._buffers[0])
        self._next = None
        block = self._buffers[0][: future.result()]
        self._buffers.rotate(1)
        if block:
            self._next = self._reader.submit(self._fill, self._buffers[0])
        return block

    def _fill(self, buffer: memoryview) -> int:
        try:
            return self._source.read_into(buffer)
        except OSError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: OSError) -> TransferError:
        """Not an error of the network, which would be tried again."""
        return TransferError(f"{self._path} cannot be read: {error.strerror}")

    def _end_reading(self) -> None:
        if self._next is not None:
            with contextlib.suppress(TransferError):
                self._next.result()
            self._next = None

    def digest(self) -> str:
        """Of the manifest and all bytes, once `at` has given the empty block."""
        return self._source.digest()

    def close(self) -> None:
        self._reader.shutdown()
        self._source.close()
