"""What the benchmark `broker` does to a broker: requests in flight, large bodies, idle clients, a flood."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Callable
from statistics import median

from benchmarks.bare_stomp import DEADLINE, acks, connect_frame, consumer, login, receive_frame, send_frame, server

IN_FLIGHT = 64
BODY = b"x" * 200
LARGE = b"x" * 2**20
LARGE_IN_FLIGHT = 8
IDLE_SECONDS = 15.0
HEART_BEAT_MS = 5_000

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


def requests_per_second(requester: socket.socket, responder: socket.socket, count: int) -> float:
    """Requests answered per second with IN_FLIGHT of them on their way, acknowledging what asks for it."""
    request, reply = send_frame("request", BODY), send_frame("reply", BODY)
    chosen = selectors.DefaultSelector()
    end: socket.socket
    for end in (requester, responder):
        chosen.register(end, selectors.EVENT_READ, end)
    rests = {requester: b"", responder: b""}
    started = time.perf_counter()
    deadline = time.monotonic() + DEADLINE
    requester.sendall(request * IN_FLIGHT)
    asked, answered = IN_FLIGHT, 0
    while answered < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{answered} of {count} requests were answered in {DEADLINE:g} seconds")
        for key, _ in chosen.select(5):
            end = key.data
            whole, _, rests[end] = (rests[end] + end.recv(262144)).rpartition(b"\0")
            if not whole:
                continue
            frames = whole.count(b"\0") + 1
            answer = acks(whole)
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


def large_mb_per_second(sender: socket.socket, receiver: socket.socket, count: int) -> float:
    """Bodies of 1 MiB from one client to another, some of them on their way; each acknowledged."""
    frame = send_frame("large", LARGE)
    window = threading.Semaphore(LARGE_IN_FLIGHT)

    def send() -> None:
        for _ in range(count):
            if not window.acquire(timeout=DEADLINE):
                return  # the receiver says what is wrong
            sender.sendall(frame)

    thread = threading.Thread(target=send, daemon=True)
    frames = _Frames()
    buffer = bytearray(1 << 20)
    began = time.perf_counter()
    thread.start()
    receiver.settimeout(DEADLINE)
    while frames.ended < count:
        size = receiver.recv_into(buffer)
        if not size:
            raise ConnectionError("the broker has ended the connection")
        before = frames.ended
        answer = acks(frames.take(memoryview(buffer)[:size]))
        if answer:
            receiver.sendall(answer)
        if frames.ended > before:
            window.release(frames.ended - before)
    seconds = time.perf_counter() - began
    thread.join()
    sender.close()
    receiver.close()
    return count * len(LARGE) / 1e6 / seconds


class _Frames:
    """Frames with bodies of the large kind in a stream: looks at their headers only, so that it is soon done."""

    def __init__(self) -> None:
        self.ended = 0
        self._left = 0  # bytes of the body, with the NUL after it
        self._head = b""

    def take(self, data: memoryview) -> bytes:
        """The headers that ended in it."""
        headers = b""
        while data:
            if self._left:
                step = min(self._left, len(data))
                self._left -= step
                self.ended += not self._left
                data = data[step:]
                continue
            had = len(self._head)
            head = self._head + bytes(data[:4096])
            begins = len(head) - len(head.lstrip(b"\n"))
            end = head.find(b"\n\n", begins)
            if end < 0:
                self._head, data = head.lstrip(b"\n"), data[4096:]
                continue
            headers += head[begins : end + 2]
            self._head, self._left, data = b"", len(LARGE) + 1, data[end + 2 - had :]
        return headers


def single_requests(port: int, count: int) -> list[float]:
    """Seconds of each request and its reply when nothing else goes on: a client that sends to itself."""
    client = consumer(port, "single")
    frame = send_frame("single", BODY)
    times = []
    for _ in range(count):
        started = time.perf_counter()
        client.sendall(frame)
        data = receive_frame(client)
        times.append(time.perf_counter() - started)
        client.sendall(acks(data))
    client.close()
    return times


def latency_beside_a_flood(port: int, rounds: int = 4, requests: int = 4_000) -> tuple[float, float]:
    """Median microseconds of one request alone, and while another client sends as fast as it can.

    Both are the lowest of several rounds in turn, because other load on the machine comes and goes.
    """
    alone, flooded = [], []
    for _ in range(rounds):
        alone.append(median(single_requests(port, requests)) * 1e6)
        with server(_FLOOD, str(port), connect_frame().decode().rstrip("\0")):
            time.sleep(0.3)
            flooded.append(median(single_requests(port, requests)) * 1e6)
    return min(alone), min(flooded)


def beside_idle_clients(port: int, clients: int, measure: Callable[[], float]) -> float:
    """What `measure` says when subscribed clients have exchanged nothing but heart-beats for a while."""
    ends: list[socket.socket] = []
    chosen = selectors.DefaultSelector()
    beat = 0.0

    def beat_when_due() -> None:
        nonlocal beat
        if time.monotonic() > beat:
            beat = time.monotonic() + HEART_BEAT_MS / 2000
            for each in ends:
                each.send(b"\n")

    for number in range(clients):
        beat_when_due()  # those that are there already: it takes longer than a heart-beat until all are
        client = consumer(port, f"idle.{number}", heart_beat_ms=HEART_BEAT_MS)
        client.setblocking(False)
        chosen.register(client, selectors.EVENT_READ)
        ends.append(client)
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
    if len(heard) != len(ends):
        raise ConnectionError(f"only {len(heard)} of {len(ends)} idle clients have heard a heart-beat")
    for client in ends:
        client.close()
    return result


def pair(port: int, one: str, other: str) -> tuple[socket.socket, socket.socket]:
    """Two clients that each consume a queue."""
    return consumer(port, one), consumer(port, other)


def sender_and_receiver(port: int) -> tuple[socket.socket, socket.socket]:
    return login(port), consumer(port, "large")
