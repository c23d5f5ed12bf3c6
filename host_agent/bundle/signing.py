"""A BOINC project's code signing key: RSA of 1,024 bits in BOINC's own format, as `crypt_prog -genkey` writes it.

The signature of a file is the RSA operation with the private exponent on the MD5 of the file, as 32 hexadecimal
characters in PKCS #1 padding of type 1. MD5 and the key's size are what BOINC clients check, not a choice of ours.
"""

from __future__ import annotations

import hashlib
import re
import stat
from pathlib import Path

import attrs

from common.errors import ConfigError

BITS = 1024
_BYTES = BITS // 8
_PRIVATE_BYTES = 3 * _BYTES + 5 * _BYTES // 2  # modulus, exponents, then what a shortcut needs
_BLOCK = 1 << 20


@attrs.frozen
class PrivateKey:
    """What a signature takes."""

    modulus: int = attrs.field(repr=False)
    exponent: int = attrs.field(repr=False)
    public_exponent: int = attrs.field(repr=False)

    @classmethod
    def load(cls, path: Path) -> PrivateKey:
        """Read a `code_sign_private`; ConfigError says what is wrong with the file, and never what is in it."""
        try:
            mode = path.stat().st_mode
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise ConfigError(
                    f"the key {path} can be used by others than its owner (mode {mode & 0o777:o})", f"chmod 600 {path}"
                )
            text = path.read_text("ascii")
        except UnicodeDecodeError:
            raise _no_key(path) from None
        except OSError as error:
            raise ConfigError(f"the key {path} cannot be read: {error.strerror}") from None
        head, _, rest = text.strip().partition("\n")
        digits = re.sub(r"\s", "", rest.partition(".")[0])
        if head.strip() != str(BITS) or not re.fullmatch(r"[0-9a-fA-F]+", digits) or len(digits) != 2 * _PRIVATE_BYTES:
            raise _no_key(path)
        data = bytes.fromhex(digits)
        modulus, public, private = (int.from_bytes(data[i * _BYTES : (i + 1) * _BYTES], "big") for i in range(3))
        key = cls(modulus, private, public)
        if modulus.bit_length() != BITS or pow(pow(2, private, modulus), public, modulus) != 2:
            raise _no_key(path)
        return key

    def sign(self, md5: str) -> str:
        """The signature of a file with this MD5, in lines of hexadecimal digits as BOINC writes them."""
        words = md5.encode("ascii")
        padded = b"\0\1" + b"\xff" * (_BYTES - 3 - len(words)) + b"\0" + words
        return hex_lines(pow(int.from_bytes(padded, "big"), self.exponent, self.modulus).to_bytes(_BYTES, "big"))

    def public(self) -> str:
        """The `code_sign_public` that goes with it."""
        both = (self.modulus, self.public_exponent)
        return f"{BITS}\n" + hex_lines(b"".join(number.to_bytes(_BYTES, "big") for number in both))


def hex_lines(data: bytes) -> str:
    """Lines of 32 bytes in hexadecimal digits, and a dot."""
    return "".join(f"{data[i : i + 32].hex()}\n" for i in range(0, len(data), 32)) + ".\n"


def md5_of(path: Path) -> str:
    """MD5 of a file's contents, which may be large."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _no_key(path: Path) -> ConfigError:
    return ConfigError(f"{path} is no private key of a BOINC project", "name the file code_sign_private, of 1,024 bits")
