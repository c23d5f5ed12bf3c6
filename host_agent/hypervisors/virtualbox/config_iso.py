"""The contextualisation ISO: files on an ISO 9660 volume, which every system can read from a CD drive.

sector 16  primary volume descriptor       18  path table (little-endian)     20  root directory
       17  end of the descriptors          19  path table (big-endian)        21  the files
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

SECTOR = 2048
VOLUME = "VMWRAPPER"
NAME = "CONFIG.JSON"  # Linux shows it as config.json
_ROOT, _FILES = 20, 21
_NO_DATE = b"0" * 16 + b"\0"


def config_iso(content: bytes) -> bytes:
    """The image of a CD with `content` as its only file."""
    return iso9660(VOLUME, {NAME: content})


def iso9660(volume: str, files: Mapping[str, bytes]) -> bytes:
    """The image of a CD with these files in its root directory, which has room for some thirty."""
    places: dict[str, int] = {}
    sectors = _FILES
    for name, content in files.items():
        places[name] = sectors
        sectors += max(1, -(-len(content) // SECTOR))
    root = _record(b"\0", _ROOT, SECTOR, directory=True)
    table = struct.pack("<BBIH", 1, 0, _ROOT, 1) + b"\0\0"
    table_big = struct.pack(">BBIH", 1, 0, _ROOT, 1) + b"\0\0"
    descriptor = b"".join(
        [
            b"\x01CD001\x01\0",
            b" " * 32,  # system
            volume.encode().ljust(32),
            b"\0" * 8,
            _both32(sectors),
            b"\0" * 32,
            _both16(1) + _both16(1) + _both16(SECTOR),
            _both32(len(table)),
            struct.pack("<II", 18, 0) + struct.pack(">II", 19, 0),
            root,
            b" " * (4 * 128 + 3 * 37),  # volume set, publisher, preparer, application, files with their texts
            _NO_DATE * 4,
            b"\x01\0",
        ]
    )
    records = [_record(f"{name};1".encode(), places[name], len(files[name])) for name in sorted(files)]
    listing = b"".join([root, _record(b"\x01", _ROOT, SECTOR, directory=True), *records])
    if len(listing) > SECTOR:
        raise ValueError(f"{len(files)} files are too many for one sector of a directory")
    parts = [b"\0" * (16 * SECTOR), descriptor, b"\xffCD001\x01", table, table_big, listing]
    parts += [content or b"\0" for content in files.values()]
    return b"".join([parts[0], *(_padded(part) for part in parts[1:])])


def _record(name: bytes, sector: int, size: int, *, directory: bool = False) -> bytes:
    odd = b"" if len(name) % 2 else b"\0"
    length = 33 + len(name) + len(odd)
    date = bytes(7)
    flags = 2 if directory else 0
    head = struct.pack("BB", length, 0) + _both32(sector) + _both32(size) + date + bytes([flags, 0, 0]) + _both16(1)
    return head + bytes([len(name)]) + name + odd


def _both16(value: int) -> bytes:
    return struct.pack("<H", value) + struct.pack(">H", value)


def _both32(value: int) -> bytes:
    return struct.pack("<I", value) + struct.pack(">I", value)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % SECTOR)
