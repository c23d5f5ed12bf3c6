"""What an emulated processor does better, in the agent's own process."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

EMULATED = b"QEMU TCG"  # what such a processor calls itself
# OpenSSL's setting that takes AVX and SSSE3 from it. It hashes with plain instructions then, which QEMU turns into
# plain ones: half as much again in a second as with vectors.
PLAIN = "~0x1000020000000000"
SETTING = "OPENSSL_ia32cap"


def hash_plainly(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Load OpenSSL so that SHA-256 is quick on an emulated processor; whether this is one.

    OpenSSL looks at its setting when it is loaded, so this comes before whatever needs it; the programs that are
    started later do not see it. Somebody's own setting stays.
    """
    try:
        with cpuinfo.open("rb") as file:
            emulated = EMULATED in file.read(2048)  # the first processor
    except OSError:
        return False
    if not emulated or SETTING in os.environ:
        return emulated
    os.environ[SETTING] = PLAIN
    try:
        importlib.import_module("hashlib")
    finally:
        del os.environ[SETTING]
    return True
