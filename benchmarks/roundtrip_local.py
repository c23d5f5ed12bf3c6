"""A command's round trip with the guest agent as a local process: /bin/true over the embedded broker.

Host agent, guest agent and client are processes of their own, as in real life. `ratio_to_bare` is the median in units
of a bare fork, exec and wait of the same program in the same run, `p50_ms` has a goal of 8 ms.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

from host_agent.control_client import ControlClient, parse_endpoint

COUNT = 300
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
            return _measure(client)
        finally:
            client.call("shutdown", deadline_s=DEADLINE)
            agent.wait(DEADLINE)
            log.close()


def _measure(client: ControlClient) -> dict[str, float]:
    roundtrips, bare, pings = [], [], []
    for _ in range(COUNT):
        began = time.perf_counter()
        subprocess.run([PROGRAM], check=True)
        bare.append(time.perf_counter() - began)
        began = time.perf_counter()
        client.call("run", {"vm": "bench", "argv": [PROGRAM]})
        roundtrips.append(time.perf_counter() - began)
        pings.append(client.call("ping", {"vm": "bench"})["round_trip_s"])
    return {
        "p50_ms": median(roundtrips) * 1e3,
        "p99_ms": quantiles(roundtrips, n=100)[98] * 1e3,
        "bare_ms": median(bare) * 1e3,
        "ratio_to_bare": median(roundtrips) / median(bare),
        "ping_ms": median(pings) * 1e3,
        "ping_ratio_to_bare": median(pings) / median(bare),
    }
