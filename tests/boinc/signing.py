"""What a BOINC client wants signed: the MD5 of an application file, with RSA of 1,024 bits, as BOINC's tools do it."""

from __future__ import annotations

import hashlib
import random

BITS = 1024
_BYTES = BITS // 8
_EXPONENT = 65537


def _probable_prime(bits: int, source: random.Random) -> int:
    while True:
        number = source.getrandbits(bits) | (3 << (bits - 2)) | 1
        if number % _EXPONENT == 1 or not all(number % small for small in (3, 5, 7, 11, 13)):
            continue
        if all(pow(base, number - 1, number) == 1 for base in (2, 3, 5, 7)):
            return number


def _lines(data: bytes) -> str:
    """Hexadecimal lines of 32 bytes, and a dot."""
    return "".join(f"{data[i : i + 32].hex()}\n" for i in range(0, len(data), 32)) + ".\n"


class Key:
    """The key pair of a project. Its primes come from a fixed seed: it protects nothing but a test."""

    def __init__(self) -> None:
        source = random.Random(2009)
        p, q = (_probable_prime(BITS // 2, source) for _ in range(2))
        self._modulus = p * q
        self._private = pow(_EXPONENT, -1, (p - 1) * (q - 1))

    def public(self) -> str:
        """The project's `code_sign_key`."""
        return f"{BITS}\n" + _lines(self._modulus.to_bytes(_BYTES, "big") + _EXPONENT.to_bytes(_BYTES, "big"))

    def sign(self, data: bytes) -> str:
        """The `file_signature` of a file."""
        text = hashlib.md5(data, usedforsecurity=False).hexdigest().encode()
        padded = b"\0\1" + b"\xff" * (_BYTES - 3 - len(text)) + b"\0" + text
        return _lines(pow(int.from_bytes(padded, "big"), self._private, self._modulus).to_bytes(_BYTES, "big"))
