"""A broker on a clock that only the test moves, and clients that exist in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from host_agent.broker.connection import BrokerConnection
from host_agent.broker.embedded import EmbeddedBroker
from host_agent.broker.frames import Frame, FrameParser, encode
from host_agent.broker.limits import BrokerLimits, FrameLimits
from host_agent.broker.principals import Principal, allow_all

PASSCODE = "right"


class MemoryTransport(StringTransport):
    """Keeps what is written; `full()` and `drain()` act like a client that stops and starts to read."""

    aborted = False

    def full(self) -> None:
        assert self.producer is not None
        self.producer.pauseProducing()

    def drain(self) -> None:
        assert self.producer is not None
        self.producer.resumeProducing()

    def abortConnection(self) -> None:
        self.aborted = True
        self.disconnecting = True

    @property
    def reading(self) -> bool:
        return self.producerState == "producing"


class Client:
    """One connected client."""

    # Any, because Twisted's in-memory transport has no type hints.
    transport: Any

    def __init__(self, clock: Clock, connection: Any) -> None:
        self.connection = connection
        make_transport: Any = MemoryTransport
        self.transport = make_transport()
        self._clock = clock
        self._parser = FrameParser(FrameLimits(body_bytes=2**30))
        connection.makeConnection(self.transport)

    def send_bytes(self, data: bytes) -> None:
        self.connection.dataReceived(data)
        settle(self._clock)

    def send(self, command: str, body: bytes = b"", /, **headers: str) -> None:
        """Send a frame; underscores in header names become hyphens."""
        self.send_bytes(encode(command, {name.replace("_", "-"): value for name, value in headers.items()}, body))

    def login(self, login: str = "anna", passcode: str = PASSCODE, **headers: str) -> Client:
        self.send("CONNECT", accept_version="1.2", host="/", login=login, passcode=passcode, **headers)
        [frame] = self.received()
        assert frame.command == "CONNECTED", frame
        return self

    def subscribe(self, destination: str, ack: str = "auto", number: str = "1", **headers: str) -> Client:
        self.send("SUBSCRIBE", id=number, destination=destination, ack=ack, **headers)
        return self

    def publish(self, destination: str, *bodies: bytes, **headers: str) -> None:
        for body in bodies:
            self.send("SEND", body, destination=destination, **headers)

    def received(self) -> list[Frame]:
        """The frames written since the last call."""
        self._parser.feed(self.transport.value())
        self.transport.clear()
        frames = []
        while (frame := self._parser.next_frame()) is not None:
            frames.append(frame)
        return frames

    def bodies(self) -> list[bytes]:
        return [frame.body for frame in self.received()]

    def error(self) -> str:
        """The sentence of the ERROR frame that must be the last thing received."""
        frame = self.received()[-1]
        assert frame.command == "ERROR", frame
        assert self.closed
        return frame.headers["message"]

    @property
    def closed(self) -> bool:
        return bool(self.transport.disconnecting)

    def drop(self) -> None:
        """The connection breaks."""
        self.connection.connectionLost(Failure(ConnectionLost()))
        settle(self._clock)


class Harness:
    """The broker, its clock and its clients; `now` is the wall clock."""

    def __init__(
        self,
        limits: BrokerLimits | None = None,
        authenticate: Callable[[str, str], Principal | None] | None = None,
    ) -> None:
        self.clock = Clock()
        self.now = 1_000_000.0
        self.broker = EmbeddedBroker(
            self.clock,
            authenticate=authenticate or any_login,
            limits=limits,
            wall_clock=lambda: self.now,
        )

    def connect(self, only: str | None = None) -> Client:
        connection = self.broker.factory_for(only).buildProtocol(IPv4Address("TCP", "127.0.0.1", 0))
        assert isinstance(connection, BrokerConnection)
        return Client(self.clock, connection)

    def client(self, **headers: str) -> Client:
        return self.connect().login(**headers)

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        settle(self.clock)


def any_login(login: str, passcode: str) -> Principal | None:
    return allow_all(login) if passcode == PASSCODE else None


def settle(clock: Clock) -> None:
    """Let everything happen that is due now."""
    for _ in range(1_000):
        if not any(call.getTime() <= clock.seconds() for call in clock.getDelayedCalls()):
            return
        clock.advance(0)
    raise AssertionError("the broker does not come to rest")
