"""Sets the times of every inode of an ext4 file system, so that the same files give the same bytes.

`mke2fs -d` takes them from the files it copies, and nobody can choose when a file was last changed or read. Only for
file systems that were just made, without check sums of their metadata (`mke2fs -O ^metadata_csum`).
"""

from __future__ import annotations

import struct
from pathlib import Path

from .tools import BuildError

_SUPERBLOCK = 1024
_METADATA_CSUM = 0x400
_UNINITIALISED = 0x1


def set_times(disk: Path, offset: int, moment: int) -> int:
    """Set them all to `moment`, but leave earlier times of change; returns how many inodes there are."""
    changed = 0
    with disk.open("r+b") as file:
        file.seek(offset + _SUPERBLOCK)
        sup = file.read(1024)
        if sup[56:58] != b"\x53\xef" or struct.unpack_from("<I", sup, 100)[0] & _METADATA_CSUM:
            raise BuildError(f"{disk}: no ext4 file system without check sums was made")
        (inodes,) = struct.unpack_from("<I", sup, 0)
        block = 1024 << struct.unpack_from("<I", sup, 24)[0]
        (per_group,) = struct.unpack_from("<I", sup, 40)
        (inode_size,) = struct.unpack_from("<H", sup, 88)
        descriptor = max(32, struct.unpack_from("<H", sup, 254)[0])
        groups = -(-inodes // per_group)
        file.seek(offset + (block if block > 1024 else 2048))
        table = file.read(groups * descriptor)
        for group in range(groups):
            entry = table[group * descriptor : (group + 1) * descriptor]
            (start,) = struct.unpack_from("<I", entry, 8)
            flags, unused = struct.unpack_from("<H", entry, 18)[0], struct.unpack_from("<H", entry, 28)[0]
            if flags & _UNINITIALISED or not per_group - unused:
                continue
            where = offset + start * block
            file.seek(where)
            data = bytearray(file.read((per_group - unused) * inode_size))
            for place in range(0, len(data), inode_size):
                changed += _set(data, place, inode_size, moment)
            file.seek(where)
            file.write(data)
    return changed


def _set(data: bytearray, place: int, inode_size: int, moment: int) -> bool:
    mode, links = struct.unpack_from("<H", data, place)[0], struct.unpack_from("<H", data, place + 26)[0]
    if not mode and not links:
        return False
    (modified,) = struct.unpack_from("<I", data, place + 16)
    struct.pack_into("<III", data, place + 8, moment, moment, min(modified, moment))
    if inode_size >= 152:
        # The parts of a second of change, modification and access, then creation.
        struct.pack_into("<IIIII", data, place + 132, 0, 0, 0, moment, 0)
    return True
