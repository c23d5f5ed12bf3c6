"""Which version of the C library a program or a shared library of Linux needs, read from the file itself."""

from __future__ import annotations

import re
import struct
from pathlib import Path

_MAGIC = b"\x7fELF"
_NEEDED_VERSIONS = 0x6FFFFFFE  # SHT_GNU_verneed
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_NEED = struct.Struct("<HHIII")  # of one library: version, count, file, first auxiliary entry, next
_AUXILIARY = struct.Struct("<IHHII")  # hash, flags, other, name, next
_GLIBC = re.compile(rb"GLIBC_(\d+)\.(\d+)(?:\.\d+)?\Z")


def needed_glibc(path: Path) -> tuple[int, int] | None:
    """The newest glibc version that it asks for; None for another kind of file. ValueError: damaged, or not 64-bit."""
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            return None
        file.seek(0)
        data = file.read()
    try:
        return max(_versions(data), default=(0, 0))
    except (struct.error, IndexError):
        raise ValueError(f"{path.name} is a damaged program file") from None


def newer_than(path: Path, limit: tuple[int, int]) -> str:
    """The version that a file needs when that is newer than `limit`, else nothing."""
    found = needed_glibc(path)
    return f"{found[0]}.{found[1]}" if found is not None and found > limit else ""


def _versions(data: bytes) -> list[tuple[int, int]]:
    if data[4:6] != b"\x02\x01":
        raise ValueError("only 64-bit little-endian programs are known here")
    header = _HEADER.unpack_from(data)
    start, size, count = header[6], header[11], header[12]
    sections = [_SECTION.unpack_from(data, start + size * index) for index in range(count)]
    found = []
    for section in sections:
        if section[1] == _NEEDED_VERSIONS:
            names = sections[section[6]][4]
            found += _section_versions(data, section[4], names)
    return found


def _section_versions(data: bytes, at: int, names: int) -> list[tuple[int, int]]:
    found = []
    while True:
        _version, count, _file, first, following = _NEED.unpack_from(data, at)
        entry = at + first
        for _ in range(count):
            *_others, name, following_entry = _AUXILIARY.unpack_from(data, entry)
            word = data[names + name : data.index(b"\0", names + name)]
            match = _GLIBC.match(word)
            if match:
                found.append((int(match[1]), int(match[2])))
            entry += following_entry
        if not following:
            return found
        at += following
