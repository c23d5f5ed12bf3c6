"""qemu-guest-agent's protocol, as its host speaks it: JSON objects, a line each, one request at a time."""

from __future__ import annotations

import base64
import json
import secrets
import socket
from pathlib import Path
from typing import Any

PORT = "org.qemu.guest_agent.0"
DEADLINE = 300.0
PIECE = 1 << 20  # bytes in a request


def options(path: Path) -> list[str]:
    """What QEMU needs for it."""
    line = ["-chardev", f"socket,id=qga,path={path},server=on,wait=off", "-device", "virtio-serial-pci,id=bench"]
    return [*line, "-device", f"virtserialport,bus=bench.0,chardev=qga,name={PORT}"]


class GuestAgent:
    """A connection to the agent in a guest."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(DEADLINE)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        mark = secrets.randbelow(1 << 30)
        request = json.dumps({"execute": "guest-sync", "arguments": {"id": mark}}).encode()
        self._socket.sendall(b"\xff" + request + b"\n")
        while json.loads(self._lines.readline().lstrip(b"\xff")).get("return") != mark:
            pass

    def ask(self, command: str, **arguments: Any) -> Any:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        answer = json.loads(self._lines.readline())
        if "error" in answer:
            raise RuntimeError(f"{command}: {answer['error']}")
        return answer["return"]

    def run(self, program: str, count: int = 1) -> None:
        """Start programs, and ask after them until all have ended."""
        waiting = [self.ask("guest-exec", path=program)["pid"] for _ in range(count)]
        while waiting:
            waiting = [pid for pid in waiting if not self.ask("guest-exec-status", pid=pid)["exited"]]

    def output(self, program: str, *words: str) -> str:
        pid = self.ask("guest-exec", path=program, arg=list(words), **{"capture-output": True})["pid"]
        while not (status := self.ask("guest-exec-status", pid=pid))["exited"]:
            pass
        return base64.b64decode(status.get("out-data", "")).decode()

    def put(self, source: Path, destination: str) -> None:
        """A file into the guest."""
        handle = self.ask("guest-file-open", path=destination, mode="w")
        with source.open("rb") as file:
            while piece := file.read(PIECE):
                done = self.ask("guest-file-write", handle=handle, **{"buf-b64": base64.b64encode(piece).decode()})
                assert done["count"] == len(piece)
        self.ask("guest-file-close", handle=handle)

    def get(self, source: str, destination: Path) -> None:
        """A file out of the guest."""
        handle = self.ask("guest-file-open", path=source, mode="r")
        with destination.open("wb") as file:
            while not (piece := self.ask("guest-file-read", handle=handle, count=PIECE))["eof"] or piece["count"]:
                file.write(base64.b64decode(piece["buf-b64"]))
        self.ask("guest-file-close", handle=handle)
