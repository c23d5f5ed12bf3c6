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


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))


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


class Qemu:
    """A program in QEMU's place, which counts how often it is asked."""

    def __init__(self, folder: Path, script: str) -> None:
        self.path = folder / "qemu"
        self._asked = folder / "asked"
        self.path.write_text(f"#!/bin/sh\necho >> {self._asked}\n{script}\n")
        self.path.chmod(0o755)

    @property
    def asked(self) -> int:
        return self._asked.read_text().count("\n") if self._asked.exists() else 0

    def probe(self) -> Any:
        """That of another host agent."""
        return KvmProbe(reactor, str(self.path))


@pytest.mark.parametrize(
    ("script", "remembered"),
    [
        ("while :; do :; done", True),
        ("exec sleep 60", False),  # a busy computer: it says nothing of KVM
        ("echo busy >&2; exit 1", False),  # asking anew costs a tenth of a second
        ("exit 33", False),
    ],
)
@ensureDeferred
async def test_what_takes_long_to_find_out_is_found_out_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, remembered: bool
) -> None:
    (tmp_path / "kvm").touch()
    monkeypatch.setattr(kvm, "DEVICE", tmp_path / "kvm")
    monkeypatch.setattr(kvm, "DEADLINE", 2.0)
    monkeypatch.setattr(kvm, "AT_WORK", 0.1)
    qemu = Qemu(tmp_path, script)
    answer = await qemu.probe().why_not()
    assert await qemu.probe().why_not() == answer
    assert qemu.asked == (1 if remembered else 2)
    assert await qemu.probe().why_not(anew=True) == answer
    assert qemu.asked == (2 if remembered else 3)
    (tmp_path / "kvm").unlink()
    assert await qemu.probe().why_not() == f"this host has no {tmp_path}/kvm", "what is so now goes before"


@ensureDeferred
async def test_that_it_gave_up_is_remembered_until_somebody_sees_it_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kvm").touch()
    monkeypatch.setattr(kvm, "DEVICE", tmp_path / "kvm")
    qemu = Qemu(tmp_path, f"[ -e {tmp_path}/kvm-broken ] || exit 33")
    first = qemu.probe()
    assert await first.why_not() == ""
    first.gave_up("Suberror: 1")
    gave_up = f"{kvm.GAVE_UP}Suberror: 1"
    assert await first.why_not() == gave_up
    assert await qemu.probe().why_not() == gave_up
    assert qemu.asked == 1
    assert "vmctl doctor" in remedy(gave_up)
    (tmp_path / "kvm-broken").touch()
    assert await qemu.probe().why_not(anew=True) == "a probe did not boot"
    assert await qemu.probe().why_not() == gave_up
    (tmp_path / "kvm-broken").unlink()
    assert await qemu.probe().why_not(anew=True) == ""
    assert await qemu.probe().why_not() == ""


@ensureDeferred
async def test_a_guest_that_shows_it_while_a_probe_boots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kvm").touch()
    monkeypatch.setattr(kvm, "DEVICE", tmp_path / "kvm")
    probe = Qemu(tmp_path, "exit 33").probe()
    asking = probe.why_not()
    probe.gave_up("Suberror: 1")
    assert await asking == await probe.why_not() == f"{kvm.GAVE_UP}Suberror: 1"


@pytest.mark.parametrize(("turns", "why_not"), [(kvm._TURNS, ""), (0, "a probe did not boot within 3 s")])
@ensureDeferred
async def test_the_probe_counts_to_its_end(monkeypatch: pytest.MonkeyPatch, turns: int, why_not: str) -> None:
    """In QEMU's own emulation, which works everywhere; from nought it counts 2³² turns, far slower than it may."""
    monkeypatch.setattr(kvm, "_TURNS", turns)
    assert await KvmProbe(reactor, shutil.which(QEMU) or "", TCG).why_not() == why_not
