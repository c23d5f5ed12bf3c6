"""An emulated processor hashes with plain instructions, in the agent's own process and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from guest_agent.emulated import PLAIN, SETTING, hash_plainly, is_emulated

EMULATED = "processor\t: 0\nmodel name\t: QEMU TCG CPU version 2.5+\n"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"), [(EMULATED, True), ("model name\t: AMD EPYC\n", False), (None, False)]
)
def test_whether_it_is_emulated(tmp_path: Path, cpuinfo: str | None, expected: bool) -> None:
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert is_emulated(tmp_path / "cpuinfo") is expected
    hash_plainly(tmp_path / "cpuinfo")
    assert SETTING not in os.environ


@pytest.mark.parametrize("own", ["", "~0x0"])
def test_openssl_is_loaded_with_the_setting_which_programs_do_not_inherit(tmp_path: Path, own: str) -> None:
    (tmp_path / "cpuinfo").write_text(EMULATED)
    script = f"""
import os, sys
import guest_agent.emulated
assert "hashlib" not in sys.modules, "too late for the setting"
loaded = []
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "_hashlib":
            loaded.append(os.environ.get("{SETTING}"))
sys.meta_path.insert(0, Finder())
guest_agent.emulated.hash_plainly(__import__("pathlib").Path({str(tmp_path / "cpuinfo")!r}))
print(loaded, os.environ.get("{SETTING}"))
"""
    env = {"PATH": os.environ["PATH"], **({SETTING: own} if own else {})}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (f"[] {own}" if own else f"['{PLAIN}'] None")
