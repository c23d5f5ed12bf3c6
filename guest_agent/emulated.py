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


def is_emulated(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    try:
        with cpuinfo.open("rb") as file:
            return EMULATED in file.read(2048)  # the first processor
    except OSError:
        return False


def hash_plainly(cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """Load OpenSSL so that digests are quick, where the processor is emulated.

    OpenSSL looks at its setting when it is loaded, so this comes before whatever needs it; the programs that are
    started later do not see it. Somebody's own setting stays.
    """
    if not is_emulated(cpuinfo) or SETTING in os.environ:
        return
    os.environ[SETTING] = PLAIN
    try:
        importlib.import_module("hashlib")
    finally:
        del os.environ[SETTING]
