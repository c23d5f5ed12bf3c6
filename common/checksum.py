"""The digests of a copy: SHA-256, by which people know it, and the one that its two ends compare.

Where the guest is emulated they compare SHA-512: made of plain instructions for 64 bits, it is almost twice as quick
there as SHA-256. The guest makes that one alone and the host both, so that the SHA-256 is of the same bytes.
"""

from __future__ import annotations

import copy
import hashlib

SHA256, SHA512 = "sha-256", "sha-512"
BOTH = (SHA512, SHA256)
DIGITS = {SHA256: 64, SHA512: 128}  # hexadecimal


class Checksum:
    """Of a stream of bytes, by one way or several; the first is the one to compare."""

    def __init__(self, ways: tuple[str, ...], data: bytes = b"") -> None:
        self.ways = ways
        self._made = [hashlib.new(way.replace("-", ""), data) for way in ways]

    def update(self, data: bytes | memoryview) -> None:
        for each in self._made:
            each.update(data)

    def with_more(self, data: bytes | memoryview) -> Checksum:
        """Another, of what this one is of and of `data` after it."""
        more = copy.copy(self)
        more._made = [each.copy() for each in self._made]
        more.update(data)
        return more

    def compared(self) -> str:
        """The digest (hex) that both ends have to find."""
        return self._made[0].hexdigest()

    def all(self) -> str:
        """Every one (hex), one after the other: SHA-256, where it is among them, is the last."""
        return "".join(each.hexdigest() for each in self._made)
