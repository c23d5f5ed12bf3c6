"""Whether KVM works is asked once, and every reason that it does not has a remedy of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import reactor

from host_agent.hypervisors import kvm
from host_agent.hypervisors.kvm import KvmProbe, remedy
from host_agent.hypervisors.qemu_options import QEMU, TCG


@ensureDeferred
async def test_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm, "DEVICE", tmp_path / "kvm")
    why_not = await KvmProbe(reactor, "false").why_not()
    assert why_not == f"this host has no {tmp_path}/kvm"
    assert "firmware" in remedy(why_not)


@ensureDeferred
async def test_a_device_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "kvm"
    device.mkdir()  # refused to everybody, also to root
    monkeypatch.setattr(kvm, "DEVICE", device)
    why_not = await KvmProbe(reactor, "false").why_not()
    assert why_not == f"{device}: Is a directory"
    assert "group kvm" in remedy(why_not)


@pytest.mark.parametrize(
    ("script", "why_not"),
    [
        ("exit 33", ""),
        ("echo 'error: failed to set MSR 0x10a' >&2; echo more >&2; exit 1", "error: failed to set MSR 0x10a"),
        ("exit 0", "a probe did not boot"),
        ("exec sleep 60", "a probe did not boot within 1 s"),
    ],
)
@ensureDeferred
async def test_what_a_boot_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, why_not: str) -> None:
    (tmp_path / "kvm").touch()
    monkeypatch.setattr(kvm, "DEVICE", tmp_path / "kvm")
    monkeypatch.setattr(kvm, "DEADLINE", 1.0)
    qemu = tmp_path / "qemu"
    qemu.write_text(f"#!/bin/sh\n{script}\n")
    qemu.chmod(0o755)
    probe: Any = KvmProbe(reactor, str(qemu))
    assert await probe.why_not() == why_not
    qemu.unlink()
    assert await probe.why_not() == why_not, "it is asked once"
    assert "nested" in remedy(why_not)


@pytest.mark.parametrize(("turns", "why_not"), [(kvm._TURNS, ""), (0, "a probe did not boot within 3 s")])
@ensureDeferred
async def test_the_probe_counts_to_its_end(monkeypatch: pytest.MonkeyPatch, turns: int, why_not: str) -> None:
    """In QEMU's own emulation, which works everywhere; from nought it counts 2³² turns, far slower than it may."""
    monkeypatch.setattr(kvm, "_TURNS", turns)
    assert await KvmProbe(reactor, shutil.which(QEMU) or "", TCG).why_not() == why_not
