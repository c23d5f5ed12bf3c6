"""A host agent whose QEMU guests have what peers need besides: ways in, devices, a bare stream.

The ways in are those of the driver (`Reachable.reach`); where they lead is in `doors.json` in the VM's directory.
Devices come from a program of QEMU's name that goes before the real one on PATH (`qemu_with`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory

from benchmarks.agent import Agent
from benchmarks.own_host import reactor, serve
from benchmarks.stream import STREAM_PORT, Stream
from common.files import write_private
from common.logs import start_logging
from host_agent.agent import build_host_agent
from host_agent.hypervisors.base import Machine, MachineSpec, MachineState
from host_agent.hypervisors.qemu import QEMU, QemuHypervisor
from host_agent.hypervisors.qemu_machine import QemuMachine
from host_agent.hypervisors.qemu_options import HOST_LINE
from host_agent.state import open_state

DOORS = "doors.json"
DOORS_DEADLINE = 30.0


class OpenHypervisor(QemuHypervisor):
    """QEMU whose guests can be reached at some ports."""

    ports: Sequence[int] = ()

    async def _create(self, spec: MachineSpec) -> Machine:
        def told(state: MachineState, reason: str) -> None:
            spec.on_state(state, reason)
            if state is MachineState.RUNNING:
                Deferred.fromCoroutine(self._open(machine)).addErrback(lambda failure: failure.printTraceback())

        machine = await super()._create(attrs.evolve(spec, on_state=told))
        return machine

    async def _open(self, machine: Machine) -> None:
        assert isinstance(machine, QemuMachine)
        _ordinary_priority(machine.pid)
        doors = {port: (await machine.reach(port)).port for port in self.ports}
        write_private(machine.spec.directory / DOORS, json.dumps(doors).encode())


def _ordinary_priority(pid: int | None) -> None:
    """The driver's VMs give way to all other work, of which a host that is measured may have some."""
    with contextlib.suppress(OSError):  # only root may
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.setpriority(os.PRIO_PROCESS, int(thread.name), 0)


def doors(agent: Agent) -> dict[int, int]:
    """Ports of the one guest, and where they are reached on the loopback; the doors open when it runs."""
    until = time.monotonic() + DOORS_DEADLINE
    while not (found := list((agent.folder / "vms").glob(f"*/{DOORS}"))):
        if time.monotonic() > until:
            raise RuntimeError("the guest's doors do not open")
        time.sleep(0.05)
    return {int(port): int(ours) for port, ours in json.loads(found[0].read_text()).items()}


def qemu_with(folder: Path, *options: str) -> dict[str, str]:
    """Environment in which a VM of the host agent has these options of QEMU besides; it starts without a template."""
    real = shutil.which(QEMU)
    program = folder / "bin" / QEMU
    program.parent.mkdir()
    more = " ".join(f"'{option}'" for option in options)
    program.write_text(f'#!/bin/sh\ncase "$*" in *{HOST_LINE}*) exec {real} "$@" {more};; esac\nexec {real} "$@"\n')
    program.chmod(0o755)
    return {"PATH": f"{program.parent}:{os.environ['PATH']}", "VMWRAPPER_WARM_START": "0"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hypervisor", choices=["qemu"])
    parser.add_argument("--state", type=Path)
    parser.add_argument("--doors", type=int, nargs="*", default=[])
    options = parser.parse_args()
    start_logging("open-host")
    hypervisor = OpenHypervisor(reactor)
    hypervisor.ports = options.doors
    agent = build_host_agent(reactor, hypervisor, open_state(options.state), reactor.stop)
    services_for = agent._vms._services_for
    stream = Factory.forProtocol(Stream)
    stream.noisy = False
    agent._vms._services_for = lambda *whose: {**services_for(*whose), STREAM_PORT: stream}
    serve(agent)


if __name__ == "__main__":
    main()
