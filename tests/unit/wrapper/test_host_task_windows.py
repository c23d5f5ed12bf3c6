"""The Windows way of running a task, which psutil makes run here too."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from host_agent.wrapper.host_task import ProcessSpec
from host_agent.wrapper.host_task_windows import WindowsProcess

TREE = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(100)"])
print(child.pid, flush=True)
while time.process_time() < 0.2: pass
time.sleep(100)
"""

Start = Callable[[str], WindowsProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started = []

    def begin(code: str) -> WindowsProcess:
        argv = [sys.executable, "-S", "-c", code]
        spec = ProcessSpec(argv[0], argv, tmp_path, None, None, tmp_path / "o", tmp_path / "e")
        started.append(WindowsProcess(spec, flags=0))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.close()


def wait_for(look: Callable[[], object]) -> None:
    until = time.monotonic() + 30
    while not look():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_end_rings(start: Start) -> None:
    process = start("import sys; sys.exit(3)")
    assert select.select([process], [], [], 30)[0]
    status = process.poll()
    assert status is not None
    assert (status.exit_code, status.signal) == (3, "")


def test_the_whole_tree(start: Start, tmp_path: Path) -> None:
    process = start(TREE)
    wait_for(lambda: (tmp_path / "o").read_text().strip())
    child = psutil.Process(int((tmp_path / "o").read_text()))
    assert process.contains(child.pid)
    wait_for(lambda: process.cpu_seconds() >= 0.1)
    process.suspend()
    wait_for(lambda: child.status() == psutil.STATUS_STOPPED)
    process.resume()
    wait_for(lambda: child.status() != psutil.STATUS_STOPPED)
    before = process.cpu_seconds()
    process.kill()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    assert process.poll() is not None
    assert process.cpu_seconds() >= before
