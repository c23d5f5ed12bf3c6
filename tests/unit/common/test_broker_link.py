"""The way to the broker: against the embedded broker, and against servers that are no good brokers."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import pytest_twisted
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet import reactor, task
from twisted.internet.defer import Deferred

from common import broker_link, stomp_connection
from common.broker_address import BrokerAddress, Credentials, Dialect, Tls
from common.broker_link import Backoff, BrokerLink
from common.link import Link
from common.messages import Output
from host_agent.broker.embedded import EmbeddedBroker
from host_agent.broker.principals import Principal, allow_all
from host_agent.broker.setup.certificates import make_authority, make_certificate

SECONDS = 30.0
LOOPBACK = "127.0.0.1"
ANNA = Credentials("anna", "right")
CONNECTED = b"CONNECTED\nversion:1.2\nheart-beat:0,0\n\n\0"


@attrs.define
class Events:
    """What a link tells, to be waited for."""

    connects: int = 0
    reasons: list[str] = attrs.field(factory=list)
    messages: list[tuple[str, bytes]] = attrs.field(factory=list)
    _waiters: list[tuple[Callable[[], bool], Deferred[None]]] = attrs.field(factory=list)

    def broker_connected(self) -> None:
        self.connects += 1
        self._look()

    def broker_disconnected(self, reason: str) -> None:
        self.reasons.append(reason)
        self._look()

    def broker_message(self, destination: str, body: bytes) -> None:
        self.messages.append((destination, body))
        self._look()

    def until(self, condition: Callable[[], bool]) -> Deferred[None]:
        waiter: Deferred[None] = Deferred()
        self._waiters.append((condition, waiter))
        waiter.addTimeout(SECONDS, reactor)
        self._look()
        return waiter

    def _look(self) -> None:
        ready = [pair for pair in self._waiters if pair[0]()]
        self._waiters = [pair for pair in self._waiters if pair not in ready]
        for _, waiter in ready:
            waiter.callback(None)


def link_to(addresses: Sequence[BrokerAddress], events: Events, *subscriptions: str) -> BrokerLink:
    return BrokerLink(reactor, addresses, ANNA, subscriptions, events)  # type: ignore[arg-type]


def authenticate(login: str, passcode: str) -> Principal | None:
    return allow_all(login) if passcode == "right" else None


async def embedded() -> tuple[EmbeddedBroker, BrokerAddress]:
    broker = EmbeddedBroker(reactor, authenticate=authenticate)
    port = await broker.listen(LOOPBACK, 0)
    place: Any = port.getHost()
    return broker, BrokerAddress(LOOPBACK, place.port)


class Server:
    """A server that does `serve` with each connection, in a thread."""

    def __init__(self, serve: Callable[[socket.socket, threading.Event], None]) -> None:
        self._listening = socket.create_server((LOOPBACK, 0))
        self._over = threading.Event()
        self._serve = serve
        self.address = BrokerAddress(LOOPBACK, self._listening.getsockname()[1])
        self.accepted = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                self.accepted += 1
                threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self._serve(connection, self._over)

    def close(self) -> None:
        self._over.set()
        self._listening.close()


@contextlib.contextmanager
def server(serve: Callable[[socket.socket, threading.Event], None]) -> Iterator[Server]:
    running = Server(serve)
    try:
        yield running
    finally:
        running.close()


def says_nothing(connection: socket.socket, over: threading.Event) -> None:
    over.wait(SECONDS)


def reads_no_more(connection: socket.socket, over: threading.Event) -> None:
    connection.recv(4096)
    connection.sendall(CONNECTED)
    over.wait(SECONDS)


def hangs_up(connection: socket.socket, over: threading.Event) -> None:
    connection.recv(4096)


def answers_and_hangs_up(connection: socket.socket, over: threading.Event) -> None:
    connection.recv(4096)
    connection.sendall(CONNECTED)


def refuses(connection: socket.socket, over: threading.Event) -> None:
    connection.recv(4096)
    connection.sendall(b"ERROR\nmessage:no such user\n\nask the operator\0")
    over.wait(SECONDS)


def sends_a_giant_frame(connection: socket.socket, over: threading.Event) -> None:
    connection.recv(4096)
    connection.sendall(CONNECTED)
    with contextlib.suppress(OSError):
        for _ in range(1000):
            connection.sendall(b"MESSAGE\nsubscription:0\n" + b"x" * 65536)


# -- against the embedded broker


@pytest_twisted.ensureDeferred
async def test_what_is_sent_arrives_and_stop_waits_for_it() -> None:
    broker, address = await embedded()
    here, there = Events(), Events()
    reader, writer = link_to([address], there, "/queue/a"), link_to([address], here)
    for link in (reader, writer):
        link.start()
    await there.until(lambda: there.connects == 1)
    await here.until(lambda: here.connects == 1)
    for number in range(2000):
        assert writer.send("/queue/a", b"%d" % number)
    await writer.stop()  # at once: what is queued must go out first, and DISCONNECT's receipt says that it did
    assert broker.statistics().enqueued == 2000
    await there.until(lambda: len(there.messages) == 2000)
    assert there.messages == [("/queue/a", b"%d" % number) for number in range(2000)]
    await reader.stop()
    await broker.stop()


@pytest_twisted.ensureDeferred
async def test_a_queue_is_drained_of_what_was_in_it() -> None:
    broker, address = await embedded()
    events = Events()
    link = link_to([address], events)
    link.start()
    await events.until(lambda: events.connects == 1)
    for _ in range(300):
        link.send("/queue/old", b"for the guest before")
    assert await link.drain("/queue/old")
    await task.deferLater(reactor, 0, lambda: None)
    assert not events.messages
    assert sum(each.messages for each in broker.statistics().destinations) == 0
    await link.stop()
    assert not await link.drain("/queue/old")
    await broker.stop()


@pytest_twisted.ensureDeferred
async def test_the_next_broker_of_the_list_is_taken_and_kept() -> None:
    broker, address = await embedded()
    closed = socket.create_server((LOOPBACK, 0))
    nobody = BrokerAddress(LOOPBACK, closed.getsockname()[1])
    closed.close()
    events = Events()
    link = link_to([nobody, address], events)
    link.start()
    await events.until(lambda: events.connects == 1)
    assert link.address == address
    assert events.reasons == [f"the broker at {nobody} cannot be reached: connection refused"]
    await link.stop()
    await broker.stop()


@pytest_twisted.ensureDeferred
async def test_it_moves_on_when_its_broker_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_link, "FIRST_WAIT", 0.05)
    first, at_first = await embedded()
    second, at_second = await embedded()
    events = Events()
    link = link_to([at_first, at_second], events, "/queue/a")
    link.start()
    await events.until(lambda: events.connects == 1)
    await first.stop()
    await events.until(lambda: events.connects == 2)
    assert link.address == at_second
    link.send("/queue/a", b"here")
    await events.until(lambda: events.messages == [("/queue/a", b"here")])
    await link.stop()
    await second.stop()


# -- against servers that are no good brokers


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize(
    ("serve", "words"),
    [
        (says_nothing, "did not answer CONNECT within"),
        (hangs_up, "closed the connection instead of answering CONNECT"),
        (answers_and_hangs_up, "closed the connection"),
        (refuses, "refuses the login 'anna': no such user ask the operator"),
        (sends_a_giant_frame, "sent a frame of more than"),
    ],
)
async def test_what_is_wrong_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, serve: Callable[[socket.socket, threading.Event], None], words: str
) -> None:
    monkeypatch.setattr(stomp_connection, "CONNECT_TIMEOUT", 0.5)
    events = Events()
    with server(serve) as bad:
        link = link_to([bad.address], events)
        link.start()
        await events.until(lambda: bool(events.reasons))
        assert events.reasons[0].startswith(f"the broker at {bad.address} ")
        assert words in events.reasons[0]
        await link.stop()


@pytest_twisted.ensureDeferred
async def test_a_broker_that_takes_and_drops_us_is_asked_ever_more_slowly() -> None:
    """A connection that succeeds for a moment is no reason to try again at once."""
    events = Events()
    with server(answers_and_hangs_up) as bad:
        link = link_to([bad.address], events)
        link.start()
        await events.until(lambda: events.connects == 2)
        assert bad.accepted <= 4  # with a second and more between them, not hundreds of times
        await link.stop()


@pytest_twisted.ensureDeferred
async def test_a_broker_that_reads_no_more_never_blocks_the_reactor() -> None:
    events = Events()
    with server(reads_no_more) as bad:
        link = link_to([bad.address], events)
        link.start()
        await events.until(lambda: events.connects == 1)
        body = b"x" * 262144
        slowest, taken = 0.0, 0
        for _ in range(400):  # 100 MiB: the sockets and the queue hold a part of it
            began = time.perf_counter()
            taken += link.send("/queue/a", body)
            slowest = max(slowest, time.perf_counter() - began)
        assert slowest < 10  # one that waits for the other side never ends here
        assert 16 <= taken < 200 and link.dropped == 400 - taken
        began = time.perf_counter()
        await link.stop()
        assert time.perf_counter() - began < broker_link.STOP_SECONDS + 10


@pytest_twisted.ensureDeferred
async def test_back_pressure_reaches_the_producer() -> None:
    """Nobody acknowledges, so the link's window fills and the producer is asked to pause, whatever the broker does."""
    events = Events()
    with server(reads_no_more) as bad:
        broker = link_to([bad.address], events)
        broker.start()
        await events.until(lambda: events.connects == 1)

        def transmit(body: bytes) -> None:
            broker.send("/queue/a", body)

        link = Link(task.Clock(), "s-1", transmit, lambda message: None)
        link.open("s-2")
        produced = 0
        while not link.congested:
            link.send(Output("c-1", "stdout", produced, b"x" * 65536))
            produced += 65536
            assert produced < 64 * 2**20
        assert broker.dropped == 0  # the window is smaller than the queue
        link.close()
        await broker.stop()


@pytest_twisted.ensureDeferred
async def test_a_broker_that_takes_nothing_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stomp_connection, "SEND_TIMEOUT", 0.5)
    events = Events()
    with server(reads_no_more) as bad:
        link = link_to([bad.address], events)
        link.start()
        await events.until(lambda: events.connects == 1)
        for _ in range(60):
            link.send("/queue/a", b"x" * 262144)
        await events.until(lambda: bool(events.reasons))
        assert "took nothing of what we send" in events.reasons[0]
        await link.stop()


@pytest_twisted.ensureDeferred
async def test_stop_while_it_is_being_connected_is_soon_over() -> None:
    events = Events()
    with server(says_nothing) as bad:
        link = link_to([bad.address], events)
        link.start()
        began = time.perf_counter()
        await link.stop()
        assert time.perf_counter() - began < 10
        assert events.connects == 0


@pytest_twisted.ensureDeferred
async def test_a_connection_to_itself_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """TCP allows it: a client that tries a closed port again and again may one day get that port for its own end."""

    def to_itself(place: tuple[str, int], timeout: float) -> socket.socket:
        made = socket.socket()
        made.bind((LOOPBACK, 0))
        made.connect(made.getsockname())
        return made

    events = Events()
    with monkeypatch.context() as patched:
        patched.setattr(socket, "create_connection", to_itself)
        link = link_to([BrokerAddress(LOOPBACK, 1)], events)
        link.start()
        await events.until(lambda: bool(events.reasons))
        await link.stop()
    assert events.reasons[0].endswith("cannot be reached: connection refused")


# -- TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories `right`, `other` (another name), `expired`; each with its own authority."""
    top = tmp_path_factory.mktemp("tls")
    for name, host, days in (
        ("right", "localhost", 10),
        ("other", "elsewhere.example", 10),
        ("expired", "localhost", 0),
    ):
        folder = top / name
        folder.mkdir()
        make_authority(folder)
        make_certificate(folder, [host], days=days)
    return top


def speaks_tls(folder: Path, certificate: str = "server") -> Callable[[socket.socket, threading.Event], None]:
    def serve(connection: socket.socket, over: threading.Event) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        key = "ca.key" if certificate == "ca" else "server.key"
        context.load_cert_chain(folder / f"{certificate}.pem", folder / key)
        with context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(4096)
            secure.sendall(CONNECTED)
            over.wait(SECONDS)

    return serve


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize(
    ("shown", "accepted", "name", "words"),
    [
        ("other", "other", "localhost", "certificate that is not for localhost; set server_name"),
        ("expired", "expired", "localhost", "has expired"),
        ("right", "other", "localhost", "unknown authority"),
        ("right", "", "localhost", "unknown authority"),
        ("self", "other", "localhost", "self-signed"),
        ("plain", "right", "localhost", "is this its port without TLS?"),
        ("silent", "right", "localhost", "did not answer in TLS in time"),
        ("right", "none", "", "is this its STOMP port, and without TLS?"),
    ],
)
async def test_what_is_wrong_with_tls_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, certificates: Path, shown: str, accepted: str, name: str, words: str
) -> None:
    if shown == "silent":
        monkeypatch.setattr(stomp_connection, "CONNECT_TIMEOUT", 0.5)
    serve = {
        "plain": refuses,
        "silent": says_nothing,
        "self": speaks_tls(certificates / "right", "ca"),
    }.get(shown) or speaks_tls(certificates / shown)
    ca = (certificates / accepted / "ca.pem").read_text() if accepted not in ("", "none") else ""
    events = Events()
    with server(serve) as bad:
        tls = None if accepted == "none" else Tls(ca, name)
        link = link_to([attrs.evolve(bad.address, tls=tls)], events)
        link.start()
        await events.until(lambda: bool(events.reasons))
        assert words in events.reasons[0], events.reasons
        assert events.connects == 0
        await link.stop()


@pytest_twisted.ensureDeferred
async def test_a_right_certificate_is_taken(certificates: Path) -> None:
    events = Events()
    with server(speaks_tls(certificates / "right")) as good:
        tls = Tls((certificates / "right" / "ca.pem").read_text(), "localhost")
        link = link_to([attrs.evolve(good.address, tls=tls)], events)
        link.start()
        await events.until(lambda: events.connects == 1)
        await link.stop()


# -- what needs no connection


@given(st.integers(1, 60))
def test_waits_grow_from_one_second_to_a_minute(attempts: int) -> None:
    backoff = Backoff()
    nominal = 1.0
    for _ in range(attempts):
        assert nominal * 0.8 <= backoff.next() <= nominal * 1.2
        nominal = min(nominal * 1.5, 60.0)
    backoff.reset()
    assert 0.8 <= backoff.next() <= 1.2


@given(st.from_regex(r"[a-z][a-z0-9.-]{0,40}", fullmatch=True), st.from_regex(r"[a-z0-9-]{1,20}", fullmatch=True))
def test_destinations_in_rabbitmqs_words(name: str, login: str) -> None:
    assert Dialect.RABBITMQ.to_send(f"/queue/{name}") == f"/exchange/{name}"
    assert Dialect.RABBITMQ.to_subscribe(f"/queue/{name}", login) == f"/amq/queue/{name}"
    assert Dialect.RABBITMQ.to_subscribe(f"/topic/{name}", login) == f"/amq/queue/{name}.{login}"
    assert Dialect.STOMP.to_send(f"/queue/{name}") == f"/queue/{name}"
