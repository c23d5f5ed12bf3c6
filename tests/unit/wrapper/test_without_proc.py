"""Trees of processes on a Unix system without /proc, such as macOS: what psutil says of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from host_agent.wrapper import process_tree
from host_agent.wrapper.host_task import ProcessSpec
from host_agent.wrapper.host_task_posix import PosixProcess
from host_agent.wrapper.task_groups import HostGroup

BURN = "while True: pass"
TREE = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {BURN!r}]); exec({BURN!r})"


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PosixProcess]:
    monkeypatch.setattr(process_tree, "PROC", tmp_path / "no proc")
    monkeypatch.setattr(HostGroup, "for_task", lambda *_: None)
    out = tmp_path / "out"
    started = PosixProcess(ProcessSpec(sys.executable, [sys.executable, "-c", TREE], tmp_path, None, None, out, out))
    yield started
    started.kill()
    started.close()


def until(what: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_tree_is_found_counted_suspended_and_ended(process: PosixProcess) -> None:
    until(lambda: len(process_tree.descendants(process.pid)) == 2)
    members = [psutil.Process(each.pid) for each in process_tree.descendants(process.pid)]
    until(lambda: process.cpu_seconds() > 0.2)
    assert all(process.contains(each.pid) for each in members)
    process.suspend()
    until(lambda: all(each.status() == psutil.STATUS_STOPPED for each in members))
    process.resume()
    until(lambda: all(each.status() == psutil.STATUS_RUNNING for each in members))
    process.kill()
    until(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in members))
