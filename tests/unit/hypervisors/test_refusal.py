"""What a host agent leaves to the next ones about the host's accelerator: it counts or does not, and never harms."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from host_agent.hypervisors import refusal
from host_agent.hypervisors.qemu_options import HVF, KVM
from host_agent.hypervisors.refusal import FILE, LONGEST, Refusal

BOOT = "11111111-2222-3333-4444-555555555555"


@pytest.fixture(autouse=True)
def boot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))
    monkeypatch.setattr(refusal, "boot_id", lambda: BOOT)


@pytest.fixture
def qemu(tmp_path: Path) -> Path:
    path = tmp_path / "qemu"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run" / FILE


@pytest.fixture
def kept(qemu: Path, file: Path) -> Refusal:
    Refusal(str(qemu), KVM).keep("it does not work")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == [FILE]
    return Refusal(str(qemu), KVM)


def test_the_next_one_reads_it_until_it_is_forgotten(kept: Refusal, file: Path) -> None:
    assert kept.read() == "it does not work"
    kept.forget()
    assert (kept.read(), file.exists()) == ("", False)
    kept.forget()


def test_it_counts_for_the_same_start_of_the_computer(kept: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal, "boot_id", lambda: BOOT.replace("1", "6"))
    assert kept.read() == ""


def test_where_a_boot_has_no_name_its_moment_is_one(qemu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal, "boot_id", lambda: "")
    monkeypatch.setattr(psutil, "boot_time", lambda: 1000000.0)
    refused = Refusal(str(qemu), KVM)
    refused.keep("no")
    monkeypatch.setattr(psutil, "boot_time", lambda: 1000001.0)
    assert refused.read() == "no"
    monkeypatch.setattr(psutil, "boot_time", lambda: 1000100.0)
    assert refused.read() == ""


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_text("#!/bin/sh\nexit 3\n"),
        lambda path: os.utime(path, (1, 1)),
        lambda path: path.unlink(),
    ],
)
def test_it_counts_for_the_same_qemu(kept: Refusal, qemu: Path, change: Callable[[Path], object]) -> None:
    change(qemu)
    assert kept.read() == ""


def test_it_counts_for_one_place_and_one_accelerator(kept: Refusal, qemu: Path) -> None:
    assert Refusal(str(qemu), HVF).read() == ""
    other = qemu.with_name("other")
    other.hardlink_to(qemu)
    assert Refusal(str(other), KVM).read() == ""


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\0" * 100,
        b"\xff\xfe{}",
        b"[]",
        b'"text"',
        b'{"of": 7}',
        b'{"why_not": "it does not work"}',
        b"[" * 100_000,
        b'{"of": ["' + b"x" * 100_000 + b'"], "why_not": ""}',
    ],
)
def test_garbage_is_as_good_as_nothing(kept: Refusal, file: Path, garbage: bytes) -> None:
    file.write_bytes(garbage)
    assert kept.read() == ""
    kept.keep("it does not work")
    assert kept.read() == "it does not work", "it was written over"


def test_what_is_no_file_of_ours_is_not_followed_and_not_waited_for(
    kept: Refusal, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    assert kept.read() == ""
    before = elsewhere.read_bytes()
    kept.keep("something else")
    assert not file.is_symlink()
    assert elsewhere.read_bytes() == before
    file.unlink()
    os.mkfifo(file)
    assert kept.read() == ""
    file.unlink()
    elsewhere.rename(file)
    assert kept.read() == "it does not work"
    with monkeypatch.context() as another:
        mine = os.getuid()
        another.setattr(os, "getuid", lambda: mine + 1)
        with pytest.raises(OSError, match="not a file of this user's"):
            refusal._read_own(file)


def test_a_place_that_cannot_be_written(
    qemu: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = Refusal(str(qemu), KVM)
    file.mkdir(parents=True)
    refused.keep("no")
    assert refused.read() == ""
    refused.forget()
    assert [path.name for path in file.parent.iterdir()] == [FILE]
    (tmp_path / "file").touch()
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "file" / "run"))
    refused.keep("no")
    refused.forget()
    assert refused.read() == ""


def test_what_a_program_said_is_one_short_line(kept: Refusal, file: Path) -> None:
    kept.keep("a\nb\x1b[31m\tc \u2028\ud800" + "x" * 10_000)
    assert kept.read() == ("a b[31m c " + "x" * 10_000)[:LONGEST]
    told = json.loads(file.read_bytes())
    file.write_text(json.dumps({**told, "why_not": "y" * 1000}))
    assert kept.read() == "y" * LONGEST
