"""STOMP by bare sockets, the same for each broker; the embedded broker alone as a process; helper processes."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import psutil

from benchmarks import profiles
from tests.brokers import TESTER, TESTER_PASSCODE

ACK = re.compile(rb"\nack:([^\n]+)\n")
DEADLINE = 120.0  # seconds


@attrs.frozen
class Server:
    """A started process and where it listens."""

    process: subprocess.Popen[str]
    port: int

    @property
    def pids(self) -> list[int]:
        return [self.process.pid]

    @property
    def memory_bytes(self) -> int:
        """Resident."""
        return int(psutil.Process(self.process.pid).memory_info().rss)


@contextlib.contextmanager
def server(program: str, *options: str) -> Iterator[Server]:
    """A Python program whose third word is where it listens: HOST:PORT."""
    with _listening([sys.executable, "-c", program, *options]) as started:
        yield started


@contextlib.contextmanager
def _listening(argv: list[str]) -> Iterator[Server]:
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            yield Server(process, int(line.split()[2].rstrip(",").rpartition(":")[2]))
        finally:
            process.terminate()


@contextlib.contextmanager
def embedded_broker(folder: Path) -> Iterator[Server]:
    """Ours, by itself, on a free port."""
    passcode_file = folder / "passcode"
    passcode_file.write_text(TESTER_PASSCODE)
    options = ["--listen", "127.0.0.1:0", "--login", TESTER, "--passcode-file", str(passcode_file)]
    with _listening([*profiles.python("host_agent.vmctl.main", "broker"), "broker", *options]) as started:
        yield started


def connect(port: int) -> socket.socket:
    """A connection without delays."""
    connected = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connected


def login(port: int, heart_beat_ms: int = 0) -> socket.socket:
    """A client that has logged in."""
    client = connect(port)
    client.sendall(connect_frame(heart_beat_ms))
    answer = receive_frame(client)
    if not answer.startswith(b"CONNECTED"):
        raise ConnectionError(f"the broker refuses the client: {answer!r}")
    return client


def connect_frame(heart_beat_ms: int = 0) -> bytes:
    return (
        f"CONNECT\naccept-version:1.2\nhost:/\nlogin:{TESTER}\npasscode:{TESTER_PASSCODE}\n"
        f"heart-beat:{heart_beat_ms},{heart_beat_ms}\n\n\0"
    ).encode()


def consumer(port: int, queue: str, *, heart_beat_ms: int = 0, ack: str = "client-individual") -> socket.socket:
    """A client that has logged in and consumes one queue."""
    client = login(port, heart_beat_ms)
    client.sendall(
        f"SUBSCRIBE\nid:1\ndestination:/queue/bench.{queue}\nack:{ack}\nreceipt:1\n"
        "prefetch-count:1000\nactivemq.prefetchSize:1000\n\n\0".encode()
    )
    answer = receive_frame(client)
    if not answer.startswith(b"RECEIPT"):
        raise ConnectionError(f"the broker refuses the subscription: {answer!r}")
    return client


def send_frame(queue: str, body: bytes) -> bytes:
    head = f"SEND\ndestination:/queue/bench.{queue}\ncontent-length:{len(body)}\n\n"
    return head.encode() + body + b"\0"


def acks(data: bytes) -> bytes:
    """For each message in it that asks for one."""
    return b"".join([b"ACK\nid:%b\n\n\0" % ack for ack in ACK.findall(data)])


def receive_frame(client: socket.socket) -> bytes:
    """One frame, of bodies without NUL, when nothing comes after it."""
    data = bytearray()
    while not data.rstrip(b"\n").endswith(b"\0"):
        piece = client.recv(1 << 20)
        if not piece:
            raise ConnectionError(f"the broker has ended the connection: {bytes(data[-300:])!r}")
        data += piece
        data = data.lstrip(b"\n")
    return bytes(data)
