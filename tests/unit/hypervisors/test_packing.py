"""A state goes through zstd into its file: at once, or from memory, where this host has room for it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import reactor

from host_agent.hypervisors import host_memory, qemu_packing
from host_agent.hypervisors.qemu_packing import SPARE_MB, ZSTD, Packing

DEADLINE = 30.0  # seconds
CONTENT = b"what a guest remembers " * 1000  # fits into a pipe

zstd = shutil.which(ZSTD) or ""


def opened() -> set[tuple[str, str]]:
    """This process's descriptors with what they are. Those of earlier tests may still be closed, at any time."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of listdir itself
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


def unpacked(path: Path) -> bytes:
    return subprocess.run([zstd, "-d", "-q", "-c", str(path)], capture_output=True, check=True).stdout


@pytest.mark.parametrize("room", [True, False])
@ensureDeferred
async def test_what_was_written_is_in_the_file(room: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_packing, "spare_mb", lambda: 64 + SPARE_MB - (not room))
    before = opened()
    path = tmp_path / "state"
    packing = Packing(reactor, zstd, path, aside_mb=64)
    assert os.path.isfile(f"/proc/self/fd/{packing.descriptor}") is room, "a memory file, or a pipe"
    qemu = os.dup(packing.descriptor)
    packing.passed()
    os.write(qemu, CONTENT)
    assert path.exists() is not room, "zstd waits until the guest runs again"
    os.close(qemu)
    assert await packing.pack().ended.addTimeout(DEADLINE, reactor) == ""
    assert unpacked(path) == CONTENT
    assert not opened() - before


@ensureDeferred
async def test_without_need_nothing_waits_in_memory(tmp_path: Path) -> None:
    packing = Packing(reactor, zstd, tmp_path / "state")
    assert (tmp_path / "state").exists()
    await packing.give_up()


@pytest.mark.parametrize("room", [True, False])
@ensureDeferred
async def test_given_up_leaves_nothing_open(room: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_packing, "spare_mb", lambda: 64 + SPARE_MB if room else 0)
    before = opened()
    packing = Packing(reactor, zstd, tmp_path / "state", aside_mb=64)
    assert await packing.give_up() == ""
    assert not opened() - before


@ensureDeferred
async def test_zstd_says_why_it_failed() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    source, target = os.pipe()
    compressor = qemu_packing.Compressor._between(reactor, [zstd, "-q", "-c"], source, full)
    for descriptor in (source, full):
        os.close(descriptor)
    os.write(target, os.urandom(4096))
    os.close(target)
    words = await compressor.ended.addTimeout(DEADLINE, reactor)
    assert words.startswith(ZSTD)
    assert "No space left" in words


def test_what_a_control_group_allows(tmp_path: Path) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for group, most in ((inner, "max"), (inner.parent, str(100 << 20))):
        (group / "cgroup.procs").touch()
        (group / "memory.max").write_text(f"{most}\n")
        (group / "memory.current").write_text(f"{40 << 20}\n")
    assert host_memory.spare_mb(inner) == 60
    (inner.parent / "memory.current").write_text(f"{140 << 20}\n")
    assert host_memory.spare_mb(inner) == 0
    (inner.parent / "memory.max").write_text("max\n")
    assert host_memory.spare_mb(inner) > 60
