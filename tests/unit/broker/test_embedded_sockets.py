"""The embedded broker on real sockets: what memory transports cannot show."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as installed_reactor
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread

from host_agent.broker.embedded import EmbeddedBroker
from host_agent.broker.limits import BrokerLimits
from tests.contract.raw_stomp import RawStomp
from tests.unit.broker.harness import PASSCODE, any_login

reactor: Any = installed_reactor
SECONDS = 60.0


@pytest.fixture
def broker() -> Iterator[EmbeddedBroker]:
    made = EmbeddedBroker(reactor, authenticate=any_login, limits=BrokerLimits(closing_seconds=0.5))
    yield made
    pytest_twisted.blockon(in_time(made.stop()))


Steps = Generator[Deferred[Any], Any, None]
on_reactor: Callable[[Callable[[EmbeddedBroker], Steps]], Callable[[EmbeddedBroker], Deferred[None]]]
on_reactor = pytest_twisted.inlineCallbacks


def in_time(result: Deferred[Any]) -> Deferred[Any]:
    return result.addTimeout(SECONDS, reactor)


def in_thread(work: Callable[[int], Any], port: int) -> Deferred[Any]:
    """Run a blocking client against the broker, which runs on this thread's reactor meanwhile."""
    return in_time(deferToThread(work, port))


def client(port: int) -> RawStomp:
    connected = RawStomp("127.0.0.1", port, seconds=SECONDS)
    assert connected.login("anna", PASSCODE).command == "CONNECTED"
    return connected


@on_reactor
def test_a_client_that_does_not_read_does_not_make_memory_grow(broker: EmbeddedBroker) -> Steps:
    listening = yield in_time(broker.listen("127.0.0.1", 0))
    port = listening.getHost().port
    count, size = 200, 100_000

    def stall(port: int) -> None:
        with client(port) as sender, client(port) as sleeper:
            sleeper.send("SUBSCRIBE", {"id": "1", "destination": "/queue/big", "receipt": "s"})
            assert sleeper.receive().command == "RECEIPT"
            for _ in range(count):
                sender.send("SEND", {"destination": "/queue/big"}, b"x" * size)
            sender.send("SEND", {"destination": "/topic/nobody", "receipt": "done"})
            assert sender.receive().command == "RECEIPT"
            # Kernel buffers take some megabytes; all the rest must still be in the queue.
            assert broker.statistics().messages > count / 2
            for _ in range(count):
                assert len(sleeper.receive().body) == size

    yield in_thread(stall, port)
    assert broker.statistics().messages == 0


@on_reactor
def test_the_error_frame_arrives_although_the_client_is_still_sending(broker: EmbeddedBroker) -> Steps:
    listening = yield in_time(broker.listen("127.0.0.1", 0))
    port = listening.getHost().port

    def oversize(port: int) -> None:
        with client(port) as sender:
            sender.send_bytes(b"SEND\ndestination:/queue/a\ncontent-length:9000000\n\n")
            for _ in range(50):
                sender.send_bytes(b"x" * 20_000)
            assert "larger than" in sender.receive().headers["message"]
            assert sender.is_closed(2)

    yield in_thread(oversize, port)


@on_reactor
def test_an_adopted_socket_is_bound_to_its_principal(broker: EmbeddedBroker) -> Steps:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        reactor.adoptStreamConnection(theirs.fileno(), socket.AF_UNIX, broker.factory_for("vm1"))

        def log_in(_: int) -> None:
            ours.settimeout(SECONDS)
            ours.sendall(b"CONNECT\naccept-version:1.2\nhost:/\nlogin:vm1\npasscode:right\n\n\0")
            assert ours.recv(4096).startswith(b"CONNECTED\n")
            ours.sendall(b"DISCONNECT\nreceipt:1\n\n\0")
            assert ours.recv(4096).startswith(b"RECEIPT\n")
            assert ours.recv(4096) == b""

        yield in_thread(log_in, 0)


@on_reactor
def test_a_flood_leaves_others_their_turn(broker: EmbeddedBroker) -> Steps:
    listening = yield in_time(broker.listen("127.0.0.1", 0))
    port = listening.getHost().port

    def flood_and_ask(port: int) -> None:
        frame = b"SEND\ndestination:/topic/flood\n\nx\0"
        with client(port) as flooder, client(port) as other:
            other.send("SUBSCRIBE", {"id": "1", "destination": "/queue/own", "receipt": "s"})
            assert other.receive().command == "RECEIPT"
            # More than the sockets hold, so the rest is in the broker's way while the other asks.
            flooder.send_bytes(frame * 20_000)
            started = time.monotonic()
            other.send("SEND", {"destination": "/queue/own"}, b"hello")
            assert other.receive().body == b"hello"
            assert time.monotonic() - started < 5

    yield in_thread(flood_and_ask, port)


@on_reactor
def test_stop_ends_with_clients_that_do_nothing(broker: EmbeddedBroker) -> Steps:
    listening = yield in_time(broker.listen("127.0.0.1", 0))
    port = listening.getHost().port
    sleeper = yield in_thread(client, port)
    started = time.monotonic()
    yield in_time(broker.stop())
    assert time.monotonic() - started < 5
    assert sleeper.receive().headers["message"] == "The broker is being stopped."
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=2)
    sleeper.close()
