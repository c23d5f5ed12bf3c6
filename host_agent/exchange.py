"""The exchange disk of an emulated guest: its copies go through it, past the network, which costs it ten times as much.

It is a file in the VM's directory. What lies on it means something only between a request of the guest's and the
answer (`files_service.py`), so no snapshot keeps it, and each start of the VM makes it anew.
"""

from __future__ import annotations

from pathlib import Path

import attrs

from common.errors import TransferError

NAME = "exchange.raw"
SERIAL = "vmwrapper-exchange"  # by which the guest knows the disk
SIZE = 8 * 1024 * 1024  # bytes: two halves, which the guest uses in turn


def make(path: Path) -> None:
    """An empty one. The file that an earlier QEMU had is not this one."""
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        file.truncate(SIZE)


@attrs.frozen
class Exchange:
    """One guest's, if it has one. Places on it come from the guest. TransferError: nothing can lie there."""

    path: Path

    def exists(self) -> bool:
        return self.path.is_file()

    def put(self, place: int, data: bytes) -> None:
        _check(place, len(data))
        try:
            with self.path.open("r+b", buffering=0) as file:
                file.seek(place)
                file.write(data)
        except OSError as error:
            raise TransferError(f"{self.path} cannot be written: {error.strerror}") from None

    def take(self, place: int, count: int) -> bytes:
        _check(place, count)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(place)
                data = file.read(count)
        except OSError as error:
            raise TransferError(f"{self.path} cannot be read: {error.strerror}") from None
        if len(data) < count:
            raise TransferError(f"{self.path} is shorter than it was")
        return data


def _check(place: int, count: int) -> None:
    if not 0 <= place <= place + count <= SIZE:
        raise TransferError(f"the exchange disk has no {count} bytes at {place}")
