"""The key pair of a test's project, as BOINC's `crypt_prog` would make it."""

from __future__ import annotations

import hashlib
import random

from host_agent.bundle.signing import BITS, PrivateKey, hex_lines

_EXPONENT = 65537


def _probable_prime(bits: int, source: random.Random) -> int:
    while True:
        number = source.getrandbits(bits) | (3 << (bits - 2)) | 1
        if number % _EXPONENT == 1 or not all(number % small for small in (3, 5, 7, 11, 13)):
            continue
        if all(pow(base, number - 1, number) == 1 for base in (2, 3, 5, 7)):
            return number


class Key:
    """Its primes come from a fixed seed: it protects nothing but a test."""

    def __init__(self) -> None:
        source = random.Random(2009)
        self._primes = [_probable_prime(BITS // 2, source) for _ in range(2)]
        p, q = self._primes
        self._exponent = pow(_EXPONENT, -1, (p - 1) * (q - 1))
        self._key = PrivateKey(p * q, self._exponent, _EXPONENT)

    def public(self) -> str:
        """The project's `code_sign_key`."""
        return self._key.public()

    def private(self) -> str:
        """The project's `code_sign_private`."""
        p, q = self._primes
        whole = (p * q, _EXPONENT, self._exponent)
        halves = (p, q, self._exponent % (p - 1), self._exponent % (q - 1), pow(q, -1, p))
        numbers = [n.to_bytes(BITS // 8, "big") for n in whole] + [n.to_bytes(BITS // 16, "big") for n in halves]
        return f"{BITS}\n" + hex_lines(b"".join(numbers))

    def sign(self, data: bytes) -> str:
        """The `file_signature` of a file."""
        return self._key.sign(hashlib.md5(data, usedforsecurity=False).hexdigest())
