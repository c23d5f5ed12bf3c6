"""A QEMU whose KVM works everywhere, and gives up when it is told to; goes before the real one on PATH.

    python kvm_qemu.py REAL_QEMU TOLD ...QEMU's own words

What is to run with KVM is emulated, and its host agent is none the wiser. When the file TOLD exists such a guest is
stopped for good as a KVM that knows no way on stops it: STOP on QMP, the run state `internal-error`, and the reason on
standard error. With "unheard" in that file there is no STOP. QEMU is this process itself, so all else of it is real; a
child of it passes QMP on, descriptors too.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
from typing import Any

KVM = ["-accel", "kvm", "-cpu", "host"]
EMULATED = ["-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max,erms=off,fsrm=off,la57=off"]
WORDS = b"""KVM internal error. Suberror: 1
extra data[0]: 0x0000000000000001
emulation failure
RAX=ffff888003c40040 RBX=0000000000000000 RCX=0000000080400040 RDX=0000000000400001
Code=24 5b 80 41 81 e3 00 00 00 40 48 8b 4c 24 58 74 31 48 89 f0 <f0> 48 0f c7 4d 20
"""
OURS = "kvm_qemu"  # the id of a command that nobody but us has sent
POLL = 0.02  # seconds


class Monitor:
    """Between a QEMU and its host agents, which come one after the other."""

    def __init__(self, listening: socket.socket, agent: str, told: str, waits: bool) -> None:
        """`waits`: its guest does not run before a `cont`."""
        self._listening = listening
        self._agent = agent
        self._told = told
        self._runs = not waits
        self._stuck = False

    def serve(self, qemu: int) -> None:
        while os.getppid() == qemu:
            if not select.select([self._listening], [], [], 0.5)[0]:
                continue
            connection, _ = self._listening.accept()
            with contextlib.suppress(OSError), connection, socket.socket(socket.AF_UNIX) as agent:
                agent.connect(self._agent)
                self._pass_on(connection, agent)

    def _pass_on(self, qemu: socket.socket, agent: socket.socket) -> None:
        ready = False
        asked: dict[Any, str] = {}  # commands by their ids
        wanted = said = b""
        while True:
            if ready and self._runs and not self._stuck and os.path.exists(self._told):
                self._stuck = True
                os.write(2, WORDS)
                qemu.sendall(json.dumps({"execute": "stop", "id": OURS}).encode() + b"\n")
            readable = select.select([qemu, agent], [], [], POLL)[0]
            if agent in readable:
                data, descriptors, _, _ = socket.recv_fds(agent, 65536, 4)
                if not data:
                    return
                *lines, wanted = (wanted + data).split(b"\n")
                for line in lines:
                    command = json.loads(line)
                    asked[command["id"]] = command["execute"]
                socket.send_fds(qemu, [data], descriptors)
                for descriptor in descriptors:
                    os.close(descriptor)
            if qemu in readable:
                data = qemu.recv(65536)
                if not data:
                    return
                *lines, said = (said + data).split(b"\n")
                for line in lines:
                    message = json.loads(line)
                    command = asked.pop(message.get("id"), "")
                    ready = ready or command == "qmp_capabilities"
                    self._runs = self._runs or command == "cont"
                    unheard = self._stuck and message.get("event") == "STOP" and self._says("unheard")
                    if message.get("id") != OURS and not unheard:
                        agent.sendall(json.dumps(self._altered(command, message)).encode() + b"\n")

    def _says(self, word: str) -> bool:
        with open(self._told, encoding="utf-8") as file:
            return word in file.read()

    def _altered(self, command: str, message: dict[str, Any]) -> dict[str, Any]:
        if self._stuck and command == "query-status":
            status = {"status": "internal-error", "running": False, "singlestep": False}
            return {"id": message["id"], "return": status}
        if self._stuck and command == "cont":
            error = {"class": "GenericError", "desc": "Resetting the Virtual Machine is required"}
            return {"id": message["id"], "error": error}
        return message


def main(real: str, told: str, *words: str) -> None:
    argv = list(words)
    at = next((at for at in range(len(argv)) if argv[at : at + len(KVM)] == KVM), None)
    if at is not None:
        argv[at : at + len(KVM)] = EMULATED
        monitor = next((n for n, word in enumerate(argv) if word.startswith("socket,id=monitor,path=")), None)
        if monitor is not None:
            path = argv[monitor].partition("path=")[2].partition(",")[0]
            listening = socket.socket(socket.AF_UNIX)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{path}.kvm")
            listening.bind(f"{path}.kvm")
            listening.listen()
            argv[monitor] = argv[monitor].replace(path, f"{path}.kvm", 1)
            qemu = os.getpid()
            if os.fork() == 0:
                os.close(1)
                Monitor(listening, path, told, "-S" in argv).serve(qemu)
                os._exit(0)
            listening.close()
    os.execv(real, [real, *argv])  # noqa: S606


if __name__ == "__main__":
    main(*sys.argv[1:])
