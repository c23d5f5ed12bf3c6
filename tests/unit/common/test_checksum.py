"""What a copy's ends compare, and the SHA-256 beside it."""

from __future__ import annotations

import hashlib

import pytest

from common.checksum import BOTH, DIGITS, SHA256, SHA512, Checksum


@pytest.mark.parametrize(("ways", "first"), [((SHA256,), hashlib.sha256), (BOTH, hashlib.sha512)])
def test_each_way_is_of_all_bytes(ways: tuple[str, ...], first: type) -> None:
    checksum = Checksum(ways, b"one")
    checksum.update(memoryview(b" two"))
    assert checksum.compared() == first(b"one two").hexdigest()
    assert checksum.all()[-DIGITS[SHA256] :] == hashlib.sha256(b"one two").hexdigest()
    assert len(checksum.all()) == sum(DIGITS[way] for way in ways)


def test_with_more_is_another_one() -> None:
    checksum = Checksum((SHA512,), b"one")
    more = checksum.with_more(b" two")
    assert more.compared() == hashlib.sha512(b"one two").hexdigest()
    assert checksum.compared() == hashlib.sha512(b"one").hexdigest()
    assert more.ways == checksum.ways
