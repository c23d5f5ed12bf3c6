"""Many guest agents in one process: the real agent's code and connections, without programs.

Reads lines of JSON: `{"start": HOME}` for a guest whose settings are in HOME/config.json, `{"stop": HOME}`. What takes
the keeper's place says that each program has ended at once, with some output if its name asks for it, and appends its
command's id to the file that is our argument: an id that is there twice has run twice.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.protocol import Factory
from twisted.internet.stdio import StandardIO
from twisted.protocols.basic import Int32StringReceiver, LineOnlyReceiver

from common.config import GuestConfig
from common.files import GUEST_STATE, keeper_socket
from guest_agent import keeper
from guest_agent.agent import build_guest_agent

OUTPUT = b"one of the lines that a program prints\n" * 32

reactor: Any = _reactor


class InstantKeeper(Int32StringReceiver):
    """Speaks as the keeper does, for a program that ends when it starts."""

    MAX_LENGTH = keeper.MAX_FRAME

    def __init__(self, boot: str, runs: int) -> None:
        self._boot = boot
        self._runs = runs
        self._held: dict[str, bytes] = {}

    def connectionMade(self) -> None:
        self._tell({"op": "state", "keeper": self._boot, "commands": []})

    def stringReceived(self, string: bytes) -> None:
        head, _ = keeper.unpack(string)
        if head["op"] == "spawn":
            os.write(self._runs, f"{head['id']}\n".encode())
            output = OUTPUT if head["argv"][0] == "talk" else b""
            self._held[head["id"]] = output
            self._end(head["id"], 0)
        elif head["op"] == "seek" and head["id"] in self._held:
            self._tell({"op": "sought", "id": head["id"]})
            self._end(head["id"], head["stdout"])
        elif head["op"] == "forget":
            for command in head["ids"]:
                self._held.pop(command, None)

    def _end(self, command: str, offset: int) -> None:
        output = self._held[command]
        if output[offset:]:
            self._tell({"op": "output", "id": command, "stream": "stdout", "offset": offset}, output[offset:])
        used = {"wall_s": 0.0, "user_s": 0.0, "system_s": 0.0, "max_rss_bytes": 0}
        end = {"outcome": "exited", "exit_code": 0, "stdout_bytes": len(output), "stderr_bytes": 0}
        self._tell({"op": "ended", "id": command, "pid": os.getpid(), **used, **end})

    def _tell(self, head: dict[str, Any], payload: bytes = b"") -> None:
        if self.transport is not None:
            self.transport.write(keeper.pack(head, payload))


class KeeperFactory(Factory):
    noisy = False

    def __init__(self, runs: int) -> None:
        self._boot = os.urandom(8).hex()
        self._runs = runs

    def buildProtocol(self, addr: object) -> InstantKeeper:
        return InstantKeeper(self._boot, self._runs)


class Swarm(LineOnlyReceiver):
    """All guests of this process."""

    delimiter = b"\n"

    def __init__(self, runs: int) -> None:
        self._runs = runs
        self._guests: dict[str, tuple[Any, Any]] = {}

    def lineReceived(self, line: bytes) -> None:
        order = json.loads(line)
        if "start" in order:
            home = Path(order["start"])
            (home / GUEST_STATE).mkdir(parents=True, exist_ok=True)
            port = reactor.listenUNIX(str(keeper_socket(home)), KeeperFactory(self._runs))
            agent = build_guest_agent(reactor, GuestConfig.load(home / "config.json"), home)
            self._guests[order["start"]] = agent, port
        else:
            agent, port = self._guests.pop(order["stop"])
            port.stopListening()
            agent.keeper_lost = lambda: None
            agent._runner._keeper_gone = lambda: None
            agent.stop()

    def connectionLost(self, reason: object = None) -> None:
        os._exit(0)  # its host has ended; nothing of us is to be kept


def main() -> None:
    runs = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    StandardIO(Swarm(runs))
    reactor.run()


if __name__ == "__main__":
    main()
