"""256 MiB into an emulated or accelerated VM and out of it, with SHA-256, against a bare TCP stream on the same path.

The bare streams go through one more service port of the same VM; a script in the guest reads and drops, or sends,
the same number of bytes, and starts its clock after Python has started. Medians of three rounds, each with all four
in turn. `large_in_ratio_to_limit` is the copy's speed in units of the stream's; the goal is 0.7.
"""

from __future__ import annotations

import os
from statistics import median
from typing import Any

from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Factory, Protocol
from zope.interface import implementer

from host_agent.hypervisors.images import DEFAULT_IMAGE, find_image
from host_agent.hypervisors.qemu import GATEWAY, QemuHypervisor

from .host import Bench, Services, with_guest

SIZE = 256 * 2**20
ROUNDS = 3
PORT = 61699
PIECE = bytes(256 * 1024)

_GUEST = f"""
import socket, sys, time
began = time.perf_counter()
stream = socket.create_connection(({GATEWAY!r}, {PORT}))
buffer, left = memoryview(bytearray(1 << 20)), {SIZE}
stream.sendall(sys.argv[1].encode())
while left:
    left -= stream.recv_into(buffer) if sys.argv[1] == "i" else stream.send(buffer[:left])
if sys.argv[1] == "o":
    stream.recv(1)
print(time.perf_counter() - began)
"""


@implementer(IPushProducer)
class _Stream(Protocol):
    """The host's end: sends SIZE bytes when it hears an "i"; after an "o" takes SIZE bytes and says so."""

    _inwards: bool | None = None
    _left = SIZE
    _paused = False

    def dataReceived(self, data: bytes) -> None:
        transport: Any = self.transport
        if self._inwards is None:
            self._inwards, data = data[:1] == b"i", data[1:]
            if self._inwards:
                transport.registerProducer(self, True)
                self.resumeProducing()
        if not self._inwards:
            self._left -= len(data)
            if not self._left:
                transport.write(b".")

    def resumeProducing(self) -> None:
        transport: Any = self.transport
        self._paused = False
        while self._left and not self._paused:
            self._left -= len(PIECE)
            transport.write(PIECE)
        if not self._left:
            transport.unregisterProducer()

    def pauseProducing(self) -> None:
        self._paused = True

    def stopProducing(self) -> None:
        self._left = 0


def _with_stream(services: Services) -> Services:
    factory = Factory.forProtocol(_Stream)
    factory.noisy = False
    return {**services, PORT: factory}


def _measure(bench: Bench) -> dict[str, float]:
    source = bench.folder / "large"
    with source.open("wb") as file:
        for _ in range(SIZE >> 20):
            file.write(os.urandom(1 << 20))

    def stream(direction: str) -> float:
        bench.run("python3", "-c", _GUEST, direction)
        return float(bench.output)

    seconds: dict[str, list[float]] = {"limit_in": [], "in": [], "limit_out": [], "out": []}
    for _ in range(ROUNDS):
        seconds["limit_in"].append(stream("i"))
        seconds["in"].append(bench.copy("put", source, "large"))
        seconds["limit_out"].append(stream("o"))
        seconds["out"].append(bench.copy("get", "large", bench.folder / "back"))
        bench.run("rm", "large")
    taken = {name: median(values) for name, values in seconds.items()}
    return {
        "large_in_ratio_to_limit": taken["limit_in"] / taken["in"],
        "large_out_ratio_to_limit": taken["limit_out"] / taken["out"],
        **{f"large_{name}_mb_s": SIZE / 1e6 / value for name, value in taken.items()},
    }


def run() -> dict[str, float]:
    """Measure; about two minutes where VMs are emulated."""
    return with_guest(QemuHypervisor, find_image(DEFAULT_IMAGE), _measure, services=_with_stream)[0]
