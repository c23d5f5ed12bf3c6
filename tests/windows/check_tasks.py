"""Tasks of a job on Windows, under a client's eyes: `python -m tests.windows.check_tasks` with a Python for Windows.

Needs no pytest, as `check_runtime.py`. This process is the client; the wrapper is another, without a console.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from host_agent.wrapper.boinc.testing import ClientSide

from .check_runtime import until

TICKS = """import sys, time
n = 0
while True:
    n += 1
    while True:
        try:
            with open(sys.argv[1], "w") as file:
                file.write(str(n))
            break
        except OSError:  # somebody reads it
            time.sleep(0.01)
    time.sleep(0.05)
"""
# In the frozen program its `sys.executable` is the wrapper, which runs a script only when it is told to.
TREE = """import subprocess, sys
mode = ["--vmwrapper-script"] if getattr(sys, "frozen", False) else []
subprocess.Popen([sys.executable, *mode, "ticks.py", "child"])
sys.argv = ["", "parent"]
"""
JOB = "<job_desc><task><application>./tree.py</application></task></job_desc>\n"
NO_CONSOLE = 0x08000000
DETACHED = 0x00000008


def wrapper() -> list[str]:
    """The wrapper of this checkout, or a frozen one that is named on the command line."""
    return sys.argv[1:] or [sys.executable, "-m", "host_agent.wrapper.main"]


def start(slot: Path, flags: int) -> subprocess.Popen[bytes]:
    (slot / "ticks.py").write_text(TICKS)
    (slot / "tree.py").write_text(TREE + TICKS)
    (slot / "job.xml").write_text(JOB)
    return subprocess.Popen(wrapper(), cwd=slot, stdin=subprocess.DEVNULL, creationflags=flags)


def numbers(slot: Path) -> list[str]:
    found = []
    for name in ("parent", "child"):
        try:
            found.append((slot / name).read_text())
        except OSError:
            found.append("")
    return found


def stands_still(what: Callable[[], object]) -> bool:
    before = what()
    time.sleep(1.0)
    return what() == before


def main() -> int:
    assert os.name == "nt", "this is for Windows"
    with tempfile.TemporaryDirectory() as name:
        slot = Path(name)
        side = ClientSide(slot, process_priority=0)
        child = start(slot, NO_CONSOLE)
        until(lambda: all(numbers(slot)), "a task and its child run, started without a console")
        side.control("<suspend/>")
        until(lambda: stands_still(lambda: numbers(slot)), "suspended by the client, both stand still")
        before = numbers(slot)
        side.control("<resume/>")
        until(lambda: all(one != other for one, other in zip(before, numbers(slot), strict=True)), "both go on")
        until(lambda: cpu_seconds(side) > 0, "CPU time is reported")
        side.control("<abort/>")
        assert child.wait(60) == 0
        until(lambda: stands_still(lambda: numbers(slot)), "aborted, the whole tree has ended")
        assert not (slot / "boinc_finish_called").exists()

    with tempfile.TemporaryDirectory() as name:
        slot = Path(name)
        side = ClientSide(slot)
        child = start(slot, DETACHED)
        until(lambda: all(numbers(slot)), "a task and its child run, started detached")
        child.kill()
        child.wait(60)
        until(lambda: stands_still(lambda: numbers(slot)), "the wrapper killed, the whole tree has ended")
    return 0


def cpu_seconds(side: ClientSide) -> float:
    text = side.status() or ""
    return float(text.partition("<current_cpu_time>")[2].partition("<")[0] or 0)


if __name__ == "__main__":
    sys.exit(main())
