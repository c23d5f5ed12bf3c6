"""Three clones of a template at once against one, in turn; and what a suspended VM computes.

Each is from the request to the host agent until the guest agent has answered. The goals: `one_s` 1.5, `three_to_one` 2,
`suspended_cpu_s` 0, of QEMU in five seconds.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

import psutil

from benchmarks.agent import START_DEADLINE, VM, Agent, host_agent
from benchmarks.report import timed

ROUNDS = 7
SUSPENDED = 5.0  # seconds


def run() -> dict[str, float]:
    """Measure; half a minute where VMs are emulated, and a boot for the template if there is none."""
    with tempfile.TemporaryDirectory(prefix="vmwrapper-bench-") as name, host_agent(Path(name) / "agent") as agent:
        _together(agent, 1)  # makes the template, if there is none
        suspended = _suspended(agent)
        _end(agent, 1)
        one, three = (median(times) for times in zip(*(_turn(agent) for _ in range(ROUNDS)), strict=True))
    return {"one_s": one, "three_s": three, "three_to_one": three / one, "suspended_cpu_s": suspended}


def _turn(agent: Agent) -> tuple[float, float]:
    one = timed(lambda: _together(agent, 1))
    _end(agent, 1)
    three = timed(lambda: _together(agent, 3))
    _end(agent, 3)
    return one, three


def _together(agent: Agent, count: int) -> None:
    where = str(agent.folder / "vms")
    requests = [{"vm": f"{VM}-{number}", "directory": where} for number in range(count)]
    for answer in [agent.client.begin("start_vm", request) for request in requests]:
        answer.wait(time.monotonic() + START_DEADLINE)


def _end(agent: Agent, count: int) -> None:
    for number in range(count):
        agent.call("stop_vm", vm=f"{VM}-{number}")


def _suspended(agent: Agent) -> float:
    agent.call("pause_vm", vm=f"{VM}-0")
    (vm,) = agent.call("vms")["vms"]
    qemu = psutil.Process(vm["pid"])
    before = sum(qemu.cpu_times()[:2])
    time.sleep(SUSPENDED)
    used = sum(qemu.cpu_times()[:2]) - before
    agent.call("resume_vm", vm=f"{VM}-0")
    return used
