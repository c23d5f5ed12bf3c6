"""Signatures as BOINC clients check them, and keys that are not used."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import ConfigError
from host_agent.bundle.signing import BITS, PrivateKey, md5_of
from tests.boinc.signing import Key


def key_file(directory: Path, text: str = "", mode: int = 0o600) -> Path:
    path = directory / "code_sign_private"
    path.write_text(text or Key().private())
    path.chmod(mode)
    return path


def test_a_signature_is_the_md5_behind_the_public_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"contents")
    key = PrivateKey.load(key_file(tmp_path))
    md5 = md5_of(tmp_path / "file")
    assert md5 == "98bf7d8c15784f0a3d63204441e1e2aa"
    signature = bytes.fromhex("".join(key.sign(md5).split("\n")).rstrip("."))
    opened = pow(int.from_bytes(signature, "big"), key.public_exponent, key.modulus).to_bytes(BITS // 8, "big")
    assert opened == b"\0\1" + b"\xff" * 93 + b"\0" + md5.encode()
    assert key.public() == Key().public()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620])
def test_a_key_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="can be used by others") as error:
        PrivateKey.load(key_file(tmp_path, mode=mode))
    assert "chmod 600" in error.value.hint


@pytest.mark.parametrize("text", ["no key", "2048\n00\n.\n", Key().public(), Key().private().replace("1024", "512", 1)])
def test_what_is_no_key_is_refused_without_a_word_of_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="no private key") as error:
        PrivateKey.load(key_file(tmp_path, text))
    assert text.strip().splitlines()[-1][:20] not in str(error.value)


def test_a_damaged_key_is_refused(tmp_path: Path) -> None:
    text = Key().private()
    with pytest.raises(ConfigError, match="no private key"):
        PrivateKey.load(key_file(tmp_path, text.replace(text[20:22], "00" if text[20:22] != "00" else "11", 1)))


def test_a_key_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        PrivateKey.load(tmp_path / "nothing")


def test_nothing_of_a_key_is_printed(tmp_path: Path) -> None:
    assert repr(PrivateKey.load(key_file(tmp_path))) == "PrivateKey()"
