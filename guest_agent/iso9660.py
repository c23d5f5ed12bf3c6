"""Reads one file from an ISO 9660 volume: enough for a contextualisation drive, without mounting it.

The drive may be a CD or any other block device. Nothing that it says is trusted: every size is bounded.
"""

from __future__ import annotations

import os
import struct
from typing import Optional

SECTOR = 2048
DESCRIPTORS = 16  # sectors that are looked at for the primary volume descriptor
DIRECTORY_MOST = 32 * SECTOR


def read_file(device: str, names: tuple[str, ...], most: int) -> Optional[bytes]:  # noqa: UP045
    """The first file of the root directory whose name (in any case, without version) is in `names`, or None."""
    try:
        fd = os.open(device, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None  # no medium, or not ours to read
    try:
        root = _root(fd)
        if root is None:
            return None
        for name, extent, size in _entries(os.pread(fd, min(root[1], DIRECTORY_MOST), root[0] * SECTOR)):
            if name in names and size <= most:
                return os.pread(fd, size, extent * SECTOR)
    except (OSError, struct.error):
        pass  # a damaged or removed medium is no medium
    finally:
        os.close(fd)
    return None


def _root(fd: int) -> tuple[int, int] | None:
    """First sector and size of the root directory."""
    for sector in range(16, 16 + DESCRIPTORS):
        head = os.pread(fd, 190, sector * SECTOR)
        if head[1:6] != b"CD001" or head[0] == 255:
            return None
        if head[0] == 1:
            return struct.unpack_from("<I", head, 158)[0], struct.unpack_from("<I", head, 166)[0]
    return None


def _entries(listing: bytes) -> list[tuple[str, int, int]]:
    """Name in lower case, first sector and size of each file in a directory."""
    found = []
    place = 0
    while place + 33 < len(listing):
        length = listing[place]
        if length == 0:  # records do not cross sectors
            place = (place // SECTOR + 1) * SECTOR
            continue
        extent, size = struct.unpack_from("<I4xI", listing, place + 2)
        flags, name_length = listing[place + 25], listing[place + 32]
        name = listing[place + 33 : place + 33 + name_length].decode("latin-1")
        if not flags & 2:
            found.append((name.partition(";")[0].rstrip(".").lower(), extent, size))
        place += length
    return found
