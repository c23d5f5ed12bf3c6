"""Stands in for the guest agent in tests of the hypervisor drivers: does what one line from the host asks for.

Runs inside the guest with the standard library alone; answers with one line of JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

SERVICE = ("10.0.2.100", 61613)
ENDED_BY_HOST = 10  # the init powers the machine off


RESTORED = threading.Event()


def main() -> int:
    if not os.path.exists(sys.argv[-1]):
        os.write(0, b'{"waiting": true}\n')
        while not os.path.exists(sys.argv[-1]):
            os.read(0, 65536)
    while True:
        RESTORED.clear()
        with socket.create_connection(SERVICE, 20) as host:
            if (status := converse(host)) is not None:
                return status


def converse(host: socket.socket) -> int | None:
    """Until the host hangs up; None when this machine was restored, and is to connect again."""
    host.settimeout(None)
    threading.Thread(target=listen, args=[host], daemon=True).start()
    say(host, hello())
    try:
        for line in host.makefile("r"):
            words = line.split()
            if words[0] == "off":
                return ENDED_BY_HOST
            say(host, getattr(sys.modules[__name__], f"do_{words[0]}")(*words[1:]))
    except OSError:
        pass
    return None if RESTORED.is_set() else 0


def listen(host: socket.socket) -> None:
    """As the agent does: a restored machine's connections lead nowhere."""
    for line in sys.stdin:
        if json.loads(line).get("restored"):
            RESTORED.set()
            host.shutdown(socket.SHUT_RDWR)
            return


def say(host: socket.socket, value: Any) -> None:
    host.sendall(json.dumps(value).encode() + b"\n")


def hello() -> dict[str, Any]:
    with open(sys.argv[-1]) as file:
        config = file.read()
    mode = os.stat(sys.argv[-1]).st_mode & 0o777
    return {"uid": os.getuid(), "groups": os.getgroups(), "config": config, "mode": mode, "home": os.getcwd()}


def do_now() -> float:
    """Its clock."""
    return time.time()


def do_random() -> str:
    """What no other machine has."""
    return os.urandom(16).hex()


def do_flood_console(kilobytes: str) -> bool:
    for number in range(int(kilobytes)):
        print(f"flood {number}", "x" * 1000, flush=True)
    return True


def do_write(path: str, text: str) -> bool:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return True


def do_read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except FileNotFoundError:
        return ""


def do_echoes(word: str) -> bool:
    """It answers."""
    return bool(word)


def do_reach(kind: str, host: str, port: str) -> str:
    """What happens to a connection to somewhere, "tcp", "udp", "tcp6" or "udp6": "open", or the error's name."""
    family = socket.AF_INET6 if kind.endswith("6") else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM if kind.startswith("tcp") else socket.SOCK_DGRAM) as one:
        one.settimeout(3)
        try:
            one.connect((host, int(port)))
            if kind.startswith("udp"):
                one.send(b"\0\x01\x01\0\0\x01\0\0\0\0\0\0\x07example\x03org\0\0\x01\0\x01")
                one.recv(512)
            return "open"
        except OSError as error:
            return type(error).__name__


def do_ping(host: str) -> str:
    """What becomes of an ICMP echo request: "answer", or the error's name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP) as one:
        one.settimeout(1)
        head = b"\x08\0%b\0\x07\0\x01"  # an echo request; the kernel fills in its own id
        packet = head % b"\0\0"
        total = sum(packet[place] << 8 | packet[place + 1] for place in range(0, len(packet), 2))
        packet = head % (0xFFFF - total % 0xFFFF).to_bytes(2, "big")
        try:
            one.sendto(packet, (host, 0))
            return "answer" if one.recv(64)[0] == 0 else "another message"
        except OSError as error:
            return type(error).__name__


HEARD: list[str] = []


def do_listen(port: str) -> bool:
    """Note whoever comes to a port from now on, TCP or UDP."""
    tcp = socket.create_server(("", int(port)), backlog=16)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("", int(port)))
    threading.Thread(target=hear, args=["tcp", tcp.accept], daemon=True).start()
    threading.Thread(target=hear, args=["udp", lambda: udp.recv(64)], daemon=True).start()
    return True


def hear(kind: str, listen: Callable[[], object]) -> None:
    while True:
        listen()
        HEARD.append(kind)


def do_heard() -> list[str]:
    return HEARD


def do_knock(port: str) -> list[str]:
    """Try a port at every address of the network, and call out to all; those that opened, but for our own."""
    ones: dict[int, tuple[str, socket.socket]] = {}
    for number in range(1, 255):
        address = f"10.0.2.{number}"
        one = socket.socket()
        one.setblocking(False)
        one.connect_ex((address, int(port)))
        ones[one.fileno()] = (address, one)
    opened = []
    waiting = select.poll()
    for descriptor in ones:
        waiting.register(descriptor, select.POLLOUT)
    until = time.monotonic() + 2
    while ones and (left := until - time.monotonic()) > 0:
        for descriptor, _ in waiting.poll(left * 1000):
            waiting.unregister(descriptor)
            address, one = ones.pop(descriptor)
            if one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                opened.append(address)
            one.close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        for address in ("10.0.2.255", "255.255.255.255", "224.0.0.1"):
            with contextlib.suppress(OSError):
                one.sendto(b"hello", (address, int(port)))
    return opened


def do_echo(count: str) -> list[bool]:
    """Several connections at once, each of which must hear itself."""
    ones = [socket.create_connection((SERVICE[0], 7), 20) for _ in range(int(count))]
    for number, one in enumerate(ones):
        one.sendall(b"%04d" % number)
    heard = [one.recv(4) == b"%04d" % number for number, one in enumerate(ones)]
    for one in ones:
        one.close()
    return heard


def do_send(megabytes: str) -> float:
    """MB/s to the service that swallows everything, until it says that it has all."""
    size = int(megabytes) << 20
    block = bytes(1 << 16)
    with socket.create_connection((SERVICE[0], 9), 20) as one:
        before = time.monotonic()
        for _ in range(size // len(block)):
            one.sendall(block)
        one.shutdown(socket.SHUT_WR)
        one.recv(1)
    return size / 1e6 / (time.monotonic() - before)


def do_receive(megabytes: str) -> float:
    """MB/s from the service that sends as much as the first line asks for."""
    size = int(megabytes) << 20
    got = 0
    with socket.create_connection((SERVICE[0], 19), 20) as one:
        before = time.monotonic()
        one.sendall(b"%d\n" % size)
        while data := one.recv(1 << 16):
            got += len(data)
    return got / 1e6 / (time.monotonic() - before)


def do_sha256(seconds: str) -> float:
    """MB/s of SHA-256."""
    digest, block, count, before = hashlib.sha256(), bytes(1 << 16), 0, time.monotonic()
    while time.monotonic() - before < float(seconds):
        digest.update(block)
        count += len(block)
    return count / 1e6 / (time.monotonic() - before)


def do_round_trips(count: str) -> float:
    """Round trips a second over an open connection, by the median of some."""
    with socket.create_connection((SERVICE[0], 7), 20) as one:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        times = []
        for _ in range(int(count)):
            before = time.monotonic()
            one.sendall(b"x")
            one.recv(1)
            times.append(time.monotonic() - before)
    return 1 / sorted(times)[len(times) // 2]
