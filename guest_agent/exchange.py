"""The exchange disk, which the hosts of emulated guests give them: copies go through it, past the network.

Such a guest receives a megabyte in ten times the time in which it reads one from a disk. The disk has two halves: while
the host fills or empties one, the guest has the other. Whatever is wrong with it, the network remains.
"""

from __future__ import annotations

import mmap
import os

from common.direct_io import DIRECT, PAGE

DISKS = "/sys/block"
SERIAL = "vmwrapper-exchange"


class ExchangeError(Exception):
    """The disk, or what the host says of it, is of no use."""


def find(disks: str = DISKS) -> str | None:
    """The device of the disk, or None."""
    try:
        for name in os.listdir(disks):  # noqa: PTH208  (pathlib costs part of a second here)
            try:
                with open(f"{disks}/{name}/serial") as file:  # noqa: PTH123
                    if file.read().strip() == SERIAL:
                        return f"/dev/{name}"
            except OSError:
                pass  # not every disk has one
    except OSError:
        pass
    return None


class Exchange:
    """The open disk. One copy at a time may use it."""

    def __init__(self, device: str) -> None:
        """OSError: it cannot be used."""
        self._handle = os.open(device, os.O_RDWR | DIRECT)
        self.size = os.lseek(self._handle, 0, os.SEEK_END)
        self.half = self.size // 2 // PAGE * PAGE
        self._memory = memoryview(mmap.mmap(-1, max(self.half, PAGE)))  # of whole pages, as the disk wants it

    def close(self) -> None:
        os.close(self._handle)

    def read(self, place: int, count: int) -> memoryview:
        """These bytes, until the next call; ExchangeError."""
        pages = self._memory[: _whole_pages(count)]
        try:
            done = os.preadv(self._handle, [pages], place)
        except OSError as error:
            raise ExchangeError(f"the exchange disk cannot be read: {error.strerror}") from None
        if done < count:
            raise ExchangeError("the exchange disk is too short")
        return pages[:count]

    def write(self, place: int, data: memoryview) -> None:
        """ExchangeError."""
        pages = self._memory[: _whole_pages(len(data))]
        pages[: len(data)] = data
        try:
            done = os.pwritev(self._handle, [pages], place)
        except OSError as error:
            raise ExchangeError(f"the exchange disk cannot be written: {error.strerror}") from None
        if done < len(data):
            raise ExchangeError("the exchange disk is too short")


def _whole_pages(count: int) -> int:
    return -(-count // PAGE) * PAGE
