"""A certificate authority of one's own and a broker's certificate, by the openssl program.

openssl rather than a Python library: whoever sets up a broker has it, and no agent needs more to be installed.
"""

from __future__ import annotations

import ipaddress
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError

DAYS = 825  # the most that today's TLS libraries accept of a server's certificate
CA_DAYS = 3650
OPENSSL_SECONDS = 60.0


def make_authority(directory: Path) -> None:
    """`ca.pem` and its key."""
    _openssl(
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-sha256",
        "-days", str(CA_DAYS), "-subj", "/CN=VMwrapper broker authority",
        "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign",
        "-keyout", str(directory / "ca.key"), "-out", str(directory / "ca.pem"),
    )  # fmt: skip
    (directory / "ca.key").chmod(0o600)


def make_certificate(directory: Path, names: Sequence[str], *, days: int = DAYS) -> None:
    """`server.pem` and `server.key` for these host names and addresses, by the authority in the directory."""
    request, extensions = directory / "server.csr", directory / "server.ext"
    extensions.write_text(
        f"subjectAltName={','.join(_alternative(name) for name in names)}\n"
        "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth\n"
    )
    _openssl(
        "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-subj", f"/CN={names[0]}",
        "-keyout", str(directory / "server.key"), "-out", str(request),
    )  # fmt: skip
    (directory / "server.key").chmod(0o600)
    _openssl(
        "x509", "-req", "-in", str(request), "-CA", str(directory / "ca.pem"), "-CAkey", str(directory / "ca.key"),
        "-CAcreateserial", "-days", str(days), "-sha256", "-extfile", str(extensions),
        "-out", str(directory / "server.pem"),
    )  # fmt: skip
    request.unlink()
    extensions.unlink()


def make_keystore(certificate: Path, key: Path, keystore: Path, passcode_file: Path) -> None:
    """A PKCS #12 file, as Java takes it. The passcode comes from a file, because others can read a command line."""
    _openssl(
        "pkcs12", "-export", "-in", str(certificate), "-inkey", str(key), "-name", "broker",
        "-out", str(keystore), "-passout", f"file:{passcode_file}",
    )  # fmt: skip
    keystore.chmod(0o600)


def take_given(directory: Path, ca: Path, certificate: Path, key: Path) -> None:
    """Copies of the operator's own."""
    for source, name, mode in ((ca, "ca.pem", 0o644), (certificate, "server.pem", 0o644), (key, "server.key", 0o600)):
        try:
            data = source.read_bytes()
        except OSError as error:
            raise ConfigError(f"{source} cannot be read: {error.strerror}") from None
        target = directory / name
        target.touch(mode=mode)
        target.write_bytes(data)


def _alternative(name: str) -> str:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return f"DNS:{name}"
    return f"IP:{name}"


def _openssl(*arguments: str) -> None:
    program = shutil.which("openssl")
    if program is None:
        raise ConfigError(
            "the program openssl, which makes the certificates, is not installed", "apt-get install openssl"
        )
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=OPENSSL_SECONDS, check=False, umask=0o077
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"openssl {arguments[0]} did not end within {OPENSSL_SECONDS:.0f} s") from None
    if done.returncode:
        raise ConfigError(f"openssl {arguments[0]} failed: {done.stderr.strip()[-500:]}")
