"""What a host needs for VMs, with cause and remedy for each thing that is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import reactor
from twisted.internet.defer import Deferred, fail

from host_agent import doctor
from host_agent.hypervisors.base import HypervisorError, Requirement
from host_agent.hypervisors.fake import FakeHypervisor
from host_agent.hypervisors.kvm import GAVE_UP
from host_agent.hypervisors.qemu_options import KVM, QEMU
from host_agent.hypervisors.refusal import Refusal


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))


@ensureDeferred
async def test_a_host_with_everything(tmp_path: Path) -> None:
    found = await doctor.look(FakeHypervisor(reactor), tmp_path)
    assert [each.name for each in found] == ["runtime directory", "temporary files", "free disk", "fake hypervisor"]
    assert all(each.met for each in found), found


class Broken(FakeHypervisor):
    def requirements(self) -> Deferred[list[Requirement]]:
        return fail(HypervisorError("the driver does not answer"))


@ensureDeferred
async def test_a_hypervisor_that_cannot_be_asked(tmp_path: Path) -> None:
    *_, last = await doctor.look(Broken(reactor), tmp_path)
    assert (last.met, last.fatal, last.found) == (False, True, "the driver does not answer")


DOCTOR = """
import sys
from pathlib import Path
from host_agent.hypervisors import kvm
kvm.DEVICE = Path(sys.argv[1])
from host_agent.vmctl.main import main
sys.exit(main(["doctor"]))
"""


def test_who_asks_hears_what_is_so_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host agent remembers that KVM gave up on a guest; `vmctl doctor` looks, and what it sees counts from now on."""
    (tmp_path / "kvm").touch()
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / QEMU
    program.write_text('#!/bin/sh\ncase "$*" in *--version*) echo QEMU;; *) exit 33;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    refusal = Refusal(QEMU, KVM)
    refusal.keep(f"{GAVE_UP}Suberror: 1")
    assert refusal.read()
    words = [sys.executable, "-c", DOCTOR, str(tmp_path / "kvm")]
    said = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert re.search(r"ok +KVM +works", said.stdout), said.stdout + said.stderr
    assert refusal.read() == ""


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=(1023 << 20)))
    found = doctor.disk(tmp_path)
    assert (found.met, found.fatal, found.found) == (False, False, f"1023 MB in {tmp_path}")
    assert "remove files" in found.remedy
    assert not doctor.disk(tmp_path / "missing").met


def test_a_place_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = doctor.disk(tmp_path)
    assert not found.met
    assert "may not write" in found.found

    def no_place() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", no_place)
    found = doctor.temporary()
    assert (found.met, found.fatal) == (False, True)
    assert "chmod 1777 /tmp" in found.remedy


def test_a_runtime_directory_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "file" / "run"))
    assert not doctor.runtime().met
