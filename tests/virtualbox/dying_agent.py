"""A host agent that makes a VM, says so, and waits for its death: `… -m tests.virtualbox.dying_agent IMAGE DIR`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from host_agent.hypervisors.base import MachineSpec
from host_agent.hypervisors.images import Image
from host_agent.hypervisors.virtualbox.driver import VirtualBoxHypervisor

reactor: Any = _reactor


async def main(image: Path, directory: Path) -> None:
    found = Image("tiny", image, "1" * 64, "x86_64", image / "disk.vdi", None, None, "", 64)
    spec = MachineSpec("crash", f"g-{directory.name}", found, directory, 64, 1, {}, b"{}", lambda state, reason: None)
    machine = await VirtualBoxHypervisor(reactor).create(spec)
    await machine.start()
    print("running", flush=True)


def failed(failure: Failure) -> None:
    failure.printTraceback()
    reactor.stop()


reactor.callWhenRunning(lambda: Deferred.fromCoroutine(main(Path(sys.argv[1]), Path(sys.argv[2]))).addErrback(failed))
reactor.run()
