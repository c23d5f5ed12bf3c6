"""The one-file guest agent: its size, how soon it is ready, its memory, and the CPU time that it takes while idle.

It runs by Debian's Python as an ordinary process, with a real host agent; everything is of the agent and its keeper
together, but for `resident_mb`, which is the agent's alone (the keeper's, which is forked from it, is `keeper_mb`).
Goals: `file_mb` 3, `ready_s` 0.5 on an idle host, `resident_mb` 35, `idle_percent` 0.2. `ready_s` is from the request
to start it until the host agent has its answer; `ratio_cpu_to_imports` is the CPU time of that in units of what the
same Python takes in the same run to import Twisted's reactor and stomp.py out of the same file.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil

from host_agent.control_client import ControlClient, parse_endpoint
from vm_images.agent_file import make_agent_file
from vm_images.cache import Cache, default_cache

PYTHON = "/usr/bin/python3"
DEADLINE = 60.0  # seconds
TIMES = 3
_IMPORTS = """
import sys
archive = sys.argv[1]
sys.path[:1] = [f"{archive}/cp{sys.version_info[0]}{sys.version_info[1]}", f"{archive}/lib"]
import twisted.internet.reactor, stomp
"""


def run() -> dict[str, float]:
    """Measure; under a minute."""
    return measure(idle_s=20.0)


def measure(idle_s: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="vmwrapper-bench-") as folder:
        place = Path(folder)
        file = make_agent_file(place / "agent.pyz", Cache(default_cache()), compilers=[PYTHON])
        imports = [_cpu_of_imports(file) for _ in range(TIMES)]
        argv = [sys.executable, "-m", "host_agent.main", "--hypervisor", "process", "--state", f"{folder}/state"]
        env = {**os.environ, "VMWRAPPER_RUNTIME": f"{folder}/run", "VMWRAPPER_GUEST_AGENT": f"{PYTHON} {file}"}
        with (place / "agent.log").open("wb") as log:
            agent = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, env=env)
        try:
            assert agent.stdout is not None
            client = ControlClient.connect(parse_endpoint(agent.stdout.readline()))
            waits, cpu = [], []
            for number in range(TIMES):
                began = time.perf_counter()
                client.call("start_vm", {"vm": f"n{number}", "directory": f"{folder}/vms"}, deadline_s=DEADLINE)
                waits.append(time.perf_counter() - began)
                cpu.append(sum(_cpu_s(each) for each in _processes(file, f"n{number}")))
            client.call("run", {"vm": "n0", "argv": ["/bin/true"]}, deadline_s=DEADLINE)
            agents = _processes(file, "n0")
            before, began = sum(map(_cpu_s, agents)), time.perf_counter()
            time.sleep(idle_s)  # it is this time that is measured
            idle = (sum(map(_cpu_s, agents)) - before) / (time.perf_counter() - began)
            main, *others = sorted((each.memory_info().rss / 1e6 for each in agents), reverse=True)
        finally:
            client.call("shutdown", deadline_s=DEADLINE)
            agent.wait(DEADLINE)
        return {
            "file_mb": file.stat().st_size / 1e6,
            "ready_s": median(waits),
            "ready_cpu_s": median(cpu),
            "imports_cpu_s": median(imports),
            "ratio_cpu_to_imports": median(cpu) / median(imports),
            "resident_mb": main,
            "keeper_mb": max(others, default=0.0),
            "idle_percent": 100 * idle,
        }


def _cpu_of_imports(file: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([PYTHON, "-I", "-S", "-c", _IMPORTS, file], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _processes(file: Path, vm: str) -> list[psutil.Process]:
    """The agent of this VM, and its keeper."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words[1:2] == [str(file)] and any(f"/vm-{vm}-" in word for word in words):
            found.append(process)
    assert found, f"no agent runs from {file}"
    return found


def _cpu_s(process: psutil.Process) -> float:
    """To the nanosecond, which /proc/PID/stat is not."""
    threads = Path(f"/proc/{process.pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9
