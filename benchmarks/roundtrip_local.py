"""A command's round trip with the guest agent as a local process: /bin/true over the embedded broker.

Host agent, guest agent and client are processes of their own, as in real life. `ratio_to_bare` is the median in units
of a bare fork, exec and wait of the same program in the same run, `p50_ms` has a goal of 8 ms. `cpu_ratio_to_bare` is
the same for CPU time, of all agents together and with a PING for each command, which other load changes little.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

import psutil

from host_agent.control_client import ControlClient, parse_endpoint

SHORT = bool(os.environ.get("VMWRAPPER_BENCH_SHORT"))
COUNT = 120 if SHORT else 300
PROGRAM = "/bin/true"
DEADLINE = 60.0  # seconds


def run() -> dict[str, float]:
    """Measure; a few seconds."""
    with tempfile.TemporaryDirectory(prefix="vmwrapper-bench-") as folder:
        argv = [sys.executable, "-m", "host_agent.main", "--hypervisor", "process", "--state", f"{folder}/state"]
        env = {**os.environ, "VMWRAPPER_RUNTIME": f"{folder}/run"}
        log = Path(folder, "agent.log").open("wb")  # noqa: SIM115
        agent = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, env=env)
        try:
            assert agent.stdout is not None
            client = ControlClient.connect(parse_endpoint(agent.stdout.readline()))
            client.call("start_vm", {"vm": "bench", "directory": f"{folder}/vms"}, deadline_s=DEADLINE)
            return _measure(client, psutil.Process(agent.pid))
        finally:
            client.call("shutdown", deadline_s=DEADLINE)
            agent.wait(DEADLINE)
            log.close()


def _cpu_s(agent: psutil.Process) -> float:
    """Of host agent, guest agent and keeper, and of the programs that they waited for."""
    tree = [agent, *agent.children(recursive=True)]
    tree += [each for each in psutil.process_iter(["cmdline"]) if _is_keeper_of(each, agent)]
    return sum(sum(process.cpu_times()[:4]) for process in dict.fromkeys(tree))


def _is_keeper_of(process: psutil.Process, agent: psutil.Process) -> bool:
    """The keeper is nobody's child; its home is in the folder of this run."""
    words = process.info["cmdline"] or []
    return any(word.startswith(agent.environ()["VMWRAPPER_RUNTIME"].removesuffix("/run") + "/vms") for word in words)


def _measure(client: ControlClient, agent: psutil.Process) -> dict[str, float]:
    roundtrips, bare, pings = [], [], []
    before = _cpu_s(agent)
    bare_cpu = 0.0
    for _ in range(COUNT):
        began, cpu = time.perf_counter(), _own_cpu_s()
        subprocess.run([PROGRAM], check=True)
        bare.append(time.perf_counter() - began)
        bare_cpu += _own_cpu_s() - cpu
        began = time.perf_counter()
        client.call("run", {"vm": "bench", "argv": [PROGRAM]})
        roundtrips.append(time.perf_counter() - began)
        pings.append(client.call("ping", {"vm": "bench"})["round_trip_s"])
    spent = _cpu_s(agent) - before
    return {
        "p50_ms": median(roundtrips) * 1e3,
        "p99_ms": quantiles(roundtrips, n=100)[98] * 1e3,
        "bare_ms": median(bare) * 1e3,
        "ratio_to_bare": median(roundtrips) / median(bare),
        "ping_ms": median(pings) * 1e3,
        "ping_ratio_to_bare": median(pings) / median(bare),
        "cpu_ms": spent / COUNT * 1e3,
        "cpu_ratio_to_bare": spent / bare_cpu,
    }


def _own_cpu_s() -> float:
    """Of this process and of those that it waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
