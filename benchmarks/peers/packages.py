"""Peers from Debian's packages and from PyPI; one that cannot be had is named with the reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSTALL = ROOT / "tools" / "install-packages"
MADE = ROOT / "build" / "bench"


class Unavailable(Exception):
    """A peer that cannot run here: a sentence."""


def need(*packages: str) -> None:
    """Install them where that is possible."""
    done = subprocess.run([str(INSTALL), *packages], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(" ".join(done.stderr.split()))


def environment(name: str) -> Path:
    """A Python environment of its own with what `lock/NAME.txt` has; its interpreter."""
    lock, place = ROOT / "lock" / f"{name}.txt", MADE / name
    python, mark = place / "bin" / "python", place / "made-from.txt"
    if not mark.exists() or mark.read_bytes() != lock.read_bytes():
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes"]
        for argv in ([sys.executable, "-m", "venv", str(place)], [*pip, "--requirement", str(lock)]):
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Unavailable(f"{' '.join(argv[:4])} failed: {done.stderr.strip()[-300:]}")
        mark.write_bytes(lock.read_bytes())
    return python
