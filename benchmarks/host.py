"""A host agent in this process with one guest, and the measuring beside it in a thread, as its client."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
from twisted.internet import reactor as _reactor
from twisted.internet.defer import ensureDeferred
from twisted.internet.interfaces import IProtocolFactory
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure

from host_agent.agent import build_host_agent
from host_agent.control_client import ControlClient, parse_endpoint
from host_agent.hypervisors.base import Hypervisor
from host_agent.hypervisors.images import Image
from host_agent.state import open_state

reactor: Any = _reactor
VM = "bench"
CPUS = int(os.environ.get("VMWRAPPER_BENCH_CPUS", "0"))  # of the guest; 0: as many as a VM gets
DEADLINE = 600.0  # seconds for one request

Services = dict[int, IProtocolFactory]


@attrs.define
class Bench:
    """What a benchmark measures with: the guest, asked through the control interface."""

    client: ControlClient
    folder: Path  # of the host, empty at first
    cold_boot_s: float
    output: bytes = b""

    def run(self, *argv: str) -> dict[str, Any]:
        """Run a program in the guest to its end; what it printed is in `output`."""
        file = self.folder / "output"
        file.unlink(missing_ok=True)
        args = {"vm": VM, "argv": list(argv), "stdout": str(file)}
        result = self.client.call("run", args, deadline_s=DEADLINE)
        if result["exit_code"] != 0:
            raise RuntimeError(f"{argv[0]} failed in the guest: {result}")
        self.output = file.read_bytes()
        return result

    def copy(self, call: str, source: object, destination: object) -> float:
        """`put` or `get`; returns its seconds, from the request to its answer."""
        began = time.perf_counter()
        args = {"vm": VM, "source": str(source), "destination": str(destination)}
        self.client.call(call, args, deadline_s=DEADLINE)
        return time.perf_counter() - began


def with_guest(
    hypervisor: Callable[[Any], Hypervisor],
    image: Image,
    measure: Callable[[Bench], dict[str, float]],
    *,
    services: Callable[[Services], Services] = lambda services: services,
    rounds: int = 1,
) -> list[dict[str, float]]:
    """Start a guest, measure in a thread, end the guest; `rounds` times. `services` may change its service ports.

    Only once in a process: it runs the reactor.
    """
    found: list[dict[str, float]] = []
    failures: list[Failure] = []

    async def go(folder: Path) -> None:
        os.environ["VMWRAPPER_RUNTIME"] = str(folder / "run")
        agent = build_host_agent(reactor, hypervisor(reactor), open_state(None), stopped=lambda: None)
        reactor.addSystemEventTrigger("before", "shutdown", agent.shut_down)  # an interrupt leaves no VM
        endpoint = await agent.start()
        vms = agent._vms
        plain = vms._services_for
        vms._services_for = lambda *whose: services(plain(*whose))
        try:
            for number in range(rounds):
                home = folder / f"host-{number}"
                home.mkdir()
                began = time.perf_counter()
                vm = await vms.start(
                    VM,
                    image,
                    folder / "vms",
                    cpus=int(os.environ.get("VMWRAPPER_BENCH_CPUS", "0")),
                    watch=lambda state, reason: None,
                )
                seconds = time.perf_counter() - began

                def measured(home: Path = home, seconds: float = seconds) -> dict[str, float]:
                    client = ControlClient.connect(parse_endpoint(endpoint.file.read_bytes()))
                    try:
                        return measure(Bench(client, home, seconds))
                    finally:
                        client.close()

                found.append(await deferToThread(measured))
                await vms.stop(vm)
        finally:
            await agent.shut_down()

    with tempfile.TemporaryDirectory(prefix="vmwrapper-bench-") as name:
        folder = Path(name)

        def start() -> None:
            done = ensureDeferred(go(folder)).addErrback(failures.append)
            done.addBoth(lambda _: reactor.callLater(0.1, reactor.stop))

        reactor.callWhenRunning(start)
        reactor.run()
    if failures:
        failures[0].raiseException()
    if len(found) < rounds:
        raise KeyboardInterrupt
    return found
