"""Cold boot of the default image under QEMU, from the request until the guest agent answers; medians of three.

`kernel_only_s` ends where the guest's init mounts its first file systems, `ratio_agent_to_cold` is the share of the
boot that comes after it: init, Python and the agent. The goal for `cold_boot_s` is 12 s.
"""

from __future__ import annotations

import time
from statistics import median

from host_agent.hypervisors.images import DEFAULT_IMAGE, find_image
from host_agent.hypervisors.qemu import QemuHypervisor

from .host import Bench, with_guest

# Seconds since /dev/shm was mounted, by the guest's own clock.
_SINCE_INIT = "echo $(date +%s.%N) $(stat -c %.9Y /dev/shm)"


def one_boot(bench: Bench) -> dict[str, float]:
    """What the start of this guest took."""
    answered = time.perf_counter()
    bench.run("sh", "-c", _SINCE_INIT)
    now, mounted = (float(word) for word in bench.output.split())
    agent = now - mounted - (time.perf_counter() - answered)
    cold = bench.cold_boot_s
    return {"cold_boot_s": cold, "kernel_only_s": cold - agent, "ratio_agent_to_cold": agent / cold}


def run() -> dict[str, float]:
    """Measure; about half a minute where VMs are emulated."""
    # Without templates, from which it would be a warm start.
    rounds = with_guest(
        lambda reactor: QemuHypervisor(reactor, warm=False), find_image(DEFAULT_IMAGE), one_boot, rounds=3
    )
    return {metric: median(found[metric] for found in rounds) for metric in rounds[0]}
