"""What runs where the system is macOS, as far as Linux can play it; `test_without_proc.py` has trees of processes."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from twisted.internet import reactor

from common.cgroup import TaskGroup
from guest_agent.accounting import ProcessAccounts, accounts
from host_agent.bundle import freeze
from host_agent.hypervisors.images import image_store
from host_agent.hypervisors.process_end import process_end
from host_agent.hypervisors.qemu_process import KILLED, HowItEnded, QemuProcess
from host_agent.wrapper import process_tree
from host_agent.wrapper.boinc import connect
from host_agent.wrapper.boinc.liveness import Liveness
from host_agent.wrapper.boinc.shared_memory import MEMORY_FILE, Channel
from host_agent.wrapper.boinc.testing import ClientSide
from host_agent.wrapper.host_task import ProcessSpec
from host_agent.wrapper.host_task_posix import PosixProcess
from vm_images.cache import default_cache


@pytest.fixture(autouse=True)
def macos(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No /proc, no control groups, no prctl and no pidfd; `sys.platform` says why."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(process_tree, "PROC", tmp_path / "no proc")
    monkeypatch.setattr(TaskGroup, "make", lambda *_: None)
    monkeypatch.delattr(os, "pidfd_open", raising=False)


def until(what: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_client_s_memory_is_a_file_of_the_slot(tmp_path: Path) -> None:
    side = ClientSide(tmp_path)
    assert (tmp_path / MEMORY_FILE).stat().st_size == 8 * 1024
    runtime = connect(tmp_path)
    try:
        assert not runtime.init().standalone
        side.control("<suspend/>")
        assert runtime.poll().suspended
        runtime.report(1.5, 1.0, 0.5)
        assert "<current_cpu_time>1.500000e+00" in (side.memory.take(Channel.APP_STATUS) or "")
    finally:
        runtime.close()


def test_the_end_of_the_client_is_seen() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as client:
        other = Liveness(client.pid)
        assert other.alive(beat=False)
    assert not other.alive(beat=True)
    assert Liveness(os.getppid()).alive(beat=False)


@pytest.mark.parametrize(("priority", "nice"), [(1, 19), (2, 10)])
def test_a_task_has_its_priority_and_its_cpu_time(tmp_path: Path, priority: int, nice: int) -> None:
    out = tmp_path / "out"
    code = "import os\nprint(os.nice(0), flush=True)\nwhile True: pass"
    before = os.nice(0)
    spec = ProcessSpec(sys.executable, [sys.executable, "-c", code], tmp_path, None, None, out, out, priority)
    process = PosixProcess(spec)
    try:
        until(lambda: process.cpu_seconds() > 0.1)
        assert int(out.read_text()) == max(before, nice)
    finally:
        process.kill()
        process.close()


def test_programs_of_a_guest_are_counted_by_process() -> None:
    assert isinstance(accounts(), ProcessAccounts)


def test_an_end_that_nobody_tells_is_taken_for_granted() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        assert process_end(reactor, process.pid).called  # no pidfd: who waits tries a little early
        process.kill()


def test_a_qemu_whose_leash_was_killed_is_ended(tmp_path: Path) -> None:
    """On Linux the kernel does it (`setpriv --pdeathsig`)."""
    ended: list[HowItEnded] = []
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as qemu:
        process = QemuProcess(reactor, tmp_path, ended.append)
        process.pid = qemu.pid
        process._lost()
        assert qemu.wait(30) == -signal.SIGKILL
    assert [how.signal for how in ended] == [KILLED]


def test_places_and_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("VMWRAPPER_CACHE", "VMWRAPPER_IMAGES", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / "Library" / "Caches" / "vmwrapper"
    assert image_store().parent.parent.parent == tmp_path / ".local"
    for machine, name in (("arm64", "arm64-apple-darwin"), ("x86_64", "x86_64-apple-darwin")):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        assert freeze.this_platform() == name


def test_wheels_for_a_frozen_program_are_those_of_this_mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr("sysconfig.get_platform", lambda: "macosx-11.0-arm64")
    monkeypatch.setattr(freeze, "install_wheels", lambda *_, **words: asked.append(words["platform"]))
    cache: Any = SimpleNamespace(layer=lambda kind, key, make: make(tmp_path))
    lock = tmp_path / "lock"
    lock.touch()
    freeze._libraries(cache, lock)
    assert asked == ["macosx_11_0_arm64"]
