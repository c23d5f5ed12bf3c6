"""The embedded broker beside ActiveMQ and RabbitMQ: requests answered per second, memory for idle clients, floods.

Both ends of the request/reply are bare sockets in this process, the same for each broker. A request of 200 bytes goes
to a queue, its reply comes back on another; both are acknowledged one by one, and 64 are in flight. Each broker is a
process of its own, and they are measured in turn; the external ones are set up as `vmctl broker init` does it.
`limit_per_second` is the same exchange, without acknowledgements, through a process that only copies
bytes from one socket to the other: what no broker can pass on this machine. `of_limit` is their ratio.
`times_the_better` is the embedded broker's rate over that of the better external one.
"""

from __future__ import annotations

import contextlib
import re
import resource
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil

from tests.brokers import TESTER, TESTER_PASSCODE, RunningBroker

IN_FLIGHT = 64
REQUESTS = 20_000
ROUNDS = 4
SINGLE_REQUESTS = 4_000
IDLE_CLIENTS = 1_000
BODY = b"x" * 200
_SECONDS = 120.0
_ACK = re.compile(rb"\nack:([^\n]+)\n")
_LOGIN = TESTER
_PASSCODE = TESTER_PASSCODE
EXTERNAL = ("activemq", "rabbitmq")
IDLE_SECONDS = 15.0
HEART_BEAT_MS = 5_000
# Not those of the tests, which start quickly and run slowly.
JAVA_OPTIONS = "-Xms64M -Xmx512M"

_BROKER = """
import argparse, sys
from host_agent.vmctl import broker
parser = argparse.ArgumentParser()
broker.add_parser(parser.add_subparsers())
arguments = parser.parse_args()
sys.exit(arguments.func(arguments))
"""

_RELAY = """
import selectors, socket
listening = socket.create_server(("127.0.0.1", 0))
print("listening on 127.0.0.1:%d" % listening.getsockname()[1], flush=True)
ends = [listening.accept()[0], listening.accept()[0]]
chosen = selectors.DefaultSelector()
for end, other in (ends, ends[::-1]):
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    chosen.register(end, selectors.EVENT_READ, other)
while True:
    for key, _ in chosen.select():
        data = key.fileobj.recv(65536)
        if not data:
            raise SystemExit
        key.data.sendall(data)
"""


_FLOOD = """
import socket, sys
client = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
client.sendall(sys.argv[2].encode() + b"\\0")
client.recv(4096)
print("listening on 127.0.0.1:0", flush=True)
frames = (b"SEND\\ndestination:/topic/bench.flood\\n\\n" + b"x" * 200 + b"\\0") * 1000
while True:
    client.sendall(frames)
"""


class Server(NamedTuple):
    """A started process and where it listens."""

    process: subprocess.Popen[str]
    port: int


def run() -> dict[str, float]:
    """Measure everything; about three minutes."""
    _raise_file_limit()
    results: dict[str, float] = {}
    with _server(_RELAY) as server:
        ends = [_connect(server.port), _connect(server.port)]
        results["limit_per_second"] = _relayed_requests(*ends)
    with tempfile.TemporaryDirectory() as folder:
        passcode_file = Path(folder) / "passcode"
        passcode_file.write_text(_PASSCODE)
        options = ["broker", "--listen", "127.0.0.1:0", "--login", _LOGIN, "--passcode-file", str(passcode_file)]
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(_server(_BROKER, *options))
            ports = {"": server.port}
            pids: dict[str, Callable[[], list[int]]] = {"": lambda: [server.process.pid]}
            for kind in EXTERNAL:
                external = RunningBroker.make(kind, Path(folder), java_options=JAVA_OPTIONS)
                ports[f"{kind}_"] = stack.enter_context(external).port
                pids[f"{kind}_"] = lambda external=external: external.pids  # type: ignore[misc]
            # In turn, and the best of each: virtual machines of languages warm up, and other load comes and goes.
            for _ in range(ROUNDS):
                for name, port in ports.items():
                    before = _cpu_seconds(pids[name]())
                    rate = _acknowledged_requests(port, REQUESTS)
                    spent = (_cpu_seconds(pids[name]()) - before) / REQUESTS * 1e6
                    results[f"{name}requests_per_second"] = max(results.get(f"{name}requests_per_second", 0.0), rate)
                    results[f"{name}cpu_us_per_request"] = min(results.get(f"{name}cpu_us_per_request", spent), spent)
            for name, port in ports.items():
                results[f"{name}one_at_a_time_median_us"] = _single_request_us(port)
            results["of_limit"] = results["requests_per_second"] / results["limit_per_second"]
            alone, flooded = latency_beside_a_flood(server.port)
            results["flood_alone_median_us"] = alone
            results["flood_beside_median_us"] = flooded
            results["flood_ratio"] = flooded / alone
            results["broker_after_load_mib"] = _resident_mib(server)
        with _server(_BROKER, *options) as idle:
            before = _resident_mib(idle)
            results["idle_clients"] = IDLE_CLIENTS
            results["idle_clients_rss_mib"] = _beside_idle_clients(idle.port, lambda: _resident_mib(idle))
            results["idle_client_kib"] = (results["idle_clients_rss_mib"] - before) * 1024 / IDLE_CLIENTS
        for kind in EXTERNAL:
            with RunningBroker.make(kind, Path(folder), java_options=JAVA_OPTIONS) as broker:
                megabytes = _beside_idle_clients(broker.port, lambda: broker.memory_bytes / 2**20)
                results[f"{kind}_idle_clients_rss_mib"] = megabytes
    better = max(results[f"{kind}_requests_per_second"] for kind in EXTERNAL)
    results["times_the_better"] = results["requests_per_second"] / better
    cheaper = min(results[f"{kind}_cpu_us_per_request"] for kind in EXTERNAL)
    results["times_less_cpu_than_the_better"] = cheaper / results["cpu_us_per_request"]
    return results


def _cpu_seconds(pids: list[int]) -> float:
    """Of these processes so far: other load on the machine changes it little, and a rate much."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return float(sum(each.user + each.system for each in times))


def _beside_idle_clients(port: int, measure: Callable[[], float]) -> float:
    """What `measure` says when subscribed clients have exchanged nothing but heart-beats for a while."""
    clients: list[socket.socket] = []
    chosen = selectors.DefaultSelector()
    beat = 0.0

    def beat_when_due() -> None:
        nonlocal beat
        if time.monotonic() > beat:
            beat = time.monotonic() + HEART_BEAT_MS / 2000
            for client in clients:
                client.send(b"\n")

    for number in range(IDLE_CLIENTS):
        beat_when_due()  # those that are there already: it takes longer than a heart-beat until all are
        client = _client(port, f"idle.{number}", HEART_BEAT_MS)
        client.setblocking(False)
        chosen.register(client, selectors.EVENT_READ)
        clients.append(client)
    heard: set[int] = set()
    until = time.monotonic() + IDLE_SECONDS
    while time.monotonic() < until:
        beat_when_due()
        for key, _ in chosen.select(0.2):
            end: socket.socket = key.fileobj  # type: ignore[assignment]
            if not end.recv(4096):
                raise ConnectionError("the broker has ended an idle client's connection")
            heard.add(key.fd)
    result = measure()
    if len(heard) != len(clients):
        raise ConnectionError(f"only {len(heard)} of {len(clients)} idle clients have heard a heart-beat")
    for client in clients:
        client.close()
    return result


def _acknowledged_requests(port: int, count: int) -> float:
    return _exchange(_client(port, "reply"), _client(port, "request"), _REQUEST, _REPLY, count)


def _relayed_requests(requester: socket.socket, responder: socket.socket) -> float:
    return _exchange(requester, responder, _REQUEST, _REPLY, REQUESTS)


def _exchange(requester: socket.socket, responder: socket.socket, request: bytes, reply: bytes, count: int) -> float:
    """Requests answered per second, acknowledging what asks to be acknowledged."""
    chosen = selectors.DefaultSelector()
    end: socket.socket
    for end in (requester, responder):
        chosen.register(end, selectors.EVENT_READ, end)
    rests = {requester: b"", responder: b""}
    started = time.perf_counter()
    deadline = time.monotonic() + _SECONDS
    requester.sendall(request * IN_FLIGHT)
    asked, answered = IN_FLIGHT, 0
    while answered < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{answered} of {count} requests were answered in {_SECONDS:g} seconds")
        for key, _ in chosen.select(5):
            end = key.data
            whole, _, rests[end] = (rests[end] + end.recv(262144)).rpartition(b"\0")
            if not whole:
                continue
            frames = whole.count(b"\0") + 1
            answer = b"".join([b"ACK\nid:%b\n\n\0" % ack for ack in _ACK.findall(whole)])
            if end is requester:
                answered += frames
                more = min(frames, count - asked)
                asked += more
                answer += request * more
            else:
                answer += reply * frames
            end.sendall(answer)
    seconds = time.perf_counter() - started
    requester.close()
    responder.close()
    return count / seconds


def _single_request_us(port: int, requests: int = SINGLE_REQUESTS) -> float:
    """The median time of one request and its reply when nothing else goes on."""
    client = _client(port, "single")
    frame = _send_frame("single")
    times = []
    for _ in range(requests):
        started = time.perf_counter()
        client.sendall(frame)
        data = client.recv(65536)
        while not data.rstrip(b"\n").endswith(b"\0"):
            data += client.recv(65536)
        times.append(time.perf_counter() - started)
        client.sendall(b"".join([b"ACK\nid:%b\n\n\0" % ack for ack in _ACK.findall(data)]))
    client.close()
    return median(times) * 1e6


def latency_beside_a_flood(port: int, rounds: int = 4, requests: int = SINGLE_REQUESTS) -> tuple[float, float]:
    """Median microseconds of one request alone, and while another client sends as fast as it can.

    Both are the lowest of several rounds in turn, because other load on the machine comes and goes.
    """
    alone, flooded = [], []
    connect = f"CONNECT\naccept-version:1.2\nlogin:{_LOGIN}\npasscode:{_PASSCODE}\n\n"
    for _ in range(rounds):
        alone.append(_single_request_us(port, requests))
        with _server(_FLOOD, str(port), connect):
            time.sleep(0.3)
            flooded.append(_single_request_us(port, requests))
    return min(alone), min(flooded)


def _send_frame(queue: str) -> bytes:
    head = f"SEND\ndestination:/queue/bench.{queue}\ncontent-length:{len(BODY)}\n\n"
    return head.encode() + BODY + b"\0"


_REQUEST = _send_frame("request")
_REPLY = _send_frame("reply")


def _client(port: int, queue: str, heart_beat_ms: int = 0) -> socket.socket:
    """A client that has logged in and consumes one queue, acknowledging each message."""
    client = _connect(port)
    client.sendall(
        f"CONNECT\naccept-version:1.2\nhost:/\nlogin:{_LOGIN}\npasscode:{_PASSCODE}\n"
        f"heart-beat:{heart_beat_ms},{heart_beat_ms}\n\n\0"
        f"SUBSCRIBE\nid:1\ndestination:/queue/bench.{queue}\nack:client-individual\nreceipt:1\n"
        "prefetch-count:1000\nactivemq.prefetchSize:1000\n\n\0".encode()
    )
    answer = b""
    while b"RECEIPT" not in answer or not answer.rstrip(b"\n").endswith(b"\0"):
        data = client.recv(4096)
        if not data:
            raise ConnectionError(f"the broker has ended the connection: {answer!r}")
        answer += data
    return client


def _connect(port: int) -> socket.socket:
    connected = socket.create_connection(("127.0.0.1", port), timeout=10)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connected


@contextlib.contextmanager
def _server(program: str, *options: str) -> Iterator[Server]:
    command = [sys.executable, "-c", program, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            yield Server(process, int(line.split()[2].rstrip(",").rpartition(":")[2]))
        finally:
            process.terminate()


def _resident_mib(server: Server) -> float:
    resident: int = psutil.Process(server.process.pid).memory_info().rss
    return resident / 2**20


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * IDLE_CLIENTS + 200
    if soft < wanted <= hard or hard == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


if __name__ == "__main__":
    for name, value in run().items():
        print(f"{name:28} {value:12.2f}")
