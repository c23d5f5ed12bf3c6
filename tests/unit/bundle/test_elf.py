"""The check of the C library's version, on this computer's own programs."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import VMwrapperError
from host_agent.bundle.elf import needed_glibc, newer_than
from host_agent.bundle.freeze import check_glibc

SHELL = Path(os.path.realpath(shutil.which("sh") or "/bin/sh"))


def test_it_agrees_with_the_dynamic_linker() -> None:
    done = subprocess.run(["ldd", "-v", SHELL], capture_output=True, text=True, check=True)
    own = done.stdout.partition("Version information:")[2].partition(f"{SHELL}:")[2].split("\n\t/")[0]
    versions = [word.partition(")")[0] for word in own.split("(GLIBC_")[1:]]
    newest = max(tuple(map(int, version.split(".")[:2])) for version in versions)
    assert needed_glibc(SHELL) == newest
    assert newer_than(SHELL, (1, 0)) == ".".join(map(str, newest))
    assert newer_than(SHELL, (99, 0)) == ""


def test_other_files_need_none(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").touch()
    assert needed_glibc(tmp_path / "text") is None
    assert needed_glibc(tmp_path / "empty") is None


@pytest.mark.parametrize("length", [6, 20, 64, 500])
def test_a_damaged_file_is_no_crash(tmp_path: Path, length: int) -> None:
    path = tmp_path / "short"
    path.write_bytes(SHELL.read_bytes()[:length])
    with pytest.raises(ValueError, match="short is a damaged program file"):
        needed_glibc(path)


def test_a_program_for_newer_systems_is_named(tmp_path: Path) -> None:
    # This Python's own program, with the version that it needs raised in place.
    data = bytearray(Path(os.path.realpath(sys.executable)).read_bytes())
    at = data.index(b"GLIBC_2.2.5\0")
    data[at : at + 12] = struct.pack("12s", b"GLIBC_2.99")
    (tmp_path / "program").write_bytes(data)
    with pytest.raises(VMwrapperError, match=r"program needs glibc 2\.99, and volunteers may have 2\.17"):
        check_glibc(tmp_path)
