"""A host process that makes one VM, says when its guest speaks, and holds it until it is killed.

python -m tests.vm.holder IMAGE DIRECTORY INSTANCE GRACE [snapshot | save | loop]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory
from twisted.internet.task import react
from twisted.protocols.basic import LineOnlyReceiver

from host_agent.hypervisors.base import MachineSpec, MachineState
from host_agent.hypervisors.images import load_image
from host_agent.hypervisors.qemu import QemuHypervisor

reactor: Any = _reactor


class Listener(LineOnlyReceiver):
    delimiter = b"\n"
    MAX_LENGTH = 1 << 16

    def __init__(self, spoke: Deferred[None]) -> None:
        self._spoke = spoke

    def lineReceived(self, line: bytes) -> None:
        if not self._spoke.called:
            self._spoke.callback(None)


def told(state: MachineState, reason: str) -> None:
    print(state.value, reason, flush=True)


async def hold(image: str, directory: str, instance: str, grace: str, *more: str) -> None:
    spoke: Deferred[None] = Deferred()
    factory = Factory.forProtocol(lambda: Listener(spoke))
    spec = MachineSpec(
        "held", instance, load_image(Path(image)), Path(directory), 128, 1, {61613: factory}, b'{"secret": 1}', told
    )
    machine = await QemuHypervisor(reactor, float(grace)).create(spec)
    await machine.start()
    await spoke
    if "snapshot" in more:
        await machine.snapshot("kept", lambda: None)
    if "save" in more:
        await machine.save_state()
    if "loop" in more:
        await machine.snapshot("kept", lambda: None)
    print("held", machine.pid, flush=True)
    while "loop" in more:
        await machine.snapshot("kept", lambda: None)
    await Deferred()


if __name__ == "__main__":
    react(lambda _: Deferred.fromCoroutine(hold(*sys.argv[1:])))
