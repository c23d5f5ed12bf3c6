"""Stands in for the guest agent in tests of the hypervisor drivers: does what one line from the host asks for.

Runs inside the guest with the standard library alone; answers with one line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import threading
import time
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
    """Seconds of one round trip over an open connection."""
    with socket.create_connection((SERVICE[0], 7), 20) as one:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        before = time.monotonic()
        for _ in range(int(count)):
            one.sendall(b"x")
            one.recv(1)
    return (time.monotonic() - before) / int(count)
