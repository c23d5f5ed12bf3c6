"""A VM's states, through the host agent and with the real guest agent: what saving, snapshots and restoring cost.

`again_s` is the time from the request to restore the VM until a new command's output has arrived from it; the goal is
2 s, as for `save_s` 3 s, for `state_MB` 40 MB and for `stood_still_s` 1 s.
"""

from __future__ import annotations

import time
from statistics import median

from host_agent.hypervisors.base import Machine, MachineSpec
from host_agent.hypervisors.images import DEFAULT_IMAGE, find_image
from host_agent.hypervisors.qemu import QemuHypervisor
from host_agent.hypervisors.qemu_machine import QemuMachine

from .host import VM, Bench, with_guest


class SeenHypervisor(QemuHypervisor):
    """Shows the driver's machine, for what the control interface does not tell."""

    machine: QemuMachine | None = None

    async def _create(self, spec: MachineSpec) -> Machine:
        machine = await super()._create(spec)
        assert isinstance(machine, QemuMachine)
        SeenHypervisor.machine = machine
        return machine


def _timed(bench: Bench, call: str, **more: str) -> float:
    began = time.perf_counter()
    bench.client.call(call, {"vm": VM, **more}, deadline_s=300.0)
    return time.perf_counter() - began


def _one(bench: Bench) -> dict[str, float]:
    found = {"snapshot_s": _timed(bench, "snapshot_vm", snapshot="one")}
    machine = SeenHypervisor.machine
    assert machine is not None
    found["stood_still_s"] = machine.stood_still
    found["save_s"] = _timed(bench, "save_vm")
    sizes = [path.stat().st_size for path in machine.spec.directory.glob("state-*")]
    found["state_MB"] = max(sizes) / 1e6
    began = time.perf_counter()
    found["start_s"] = _timed(bench, "resume_vm")
    bench.run("true")
    found["again_s"] = time.perf_counter() - began
    return found


def run() -> dict[str, float]:
    """Measure; medians of three; about half a minute where VMs are emulated."""
    rounds = with_guest(SeenHypervisor, find_image(DEFAULT_IMAGE), _one, rounds=3)
    return {metric: median(found[metric] for found in rounds) for metric in rounds[0]}
