"""What our two agents need of a STOMP broker: the same tests for every broker that we support.

A subclass gives the `broker` fixture, the address of a live broker. Clients are stomp.py's own,
which the agents use, and a bare socket, which can break the rules. Every wait has a deadline.
"""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import stomp

from common.broker_address import BrokerAddress, Tls
from common.stomp_connection import Stomp
from tests.contract.raw_stomp import RawFrame, RawStomp, encode

SECONDS = 60.0
SILENCE = 0.3


@attrs.frozen
class BrokerUnderTest:
    """Where a broker is, and where it differs from others."""

    host: str
    port: int
    login: str
    passcode: str
    body_bytes: int
    """The largest body it is configured to take."""

    ca: str = attrs.field(default="", repr=False)
    """PEM of its authority, when it speaks TLS."""

    heart_beat_ms: int = 500
    """A heart-beat interval that the broker agrees to."""

    limits_unfinished_bodies: bool = True
    """Whether a body over the limit ends the connection before it has come whole."""

    closes_after_error: bool = True
    """Whether an ERROR frame is the last of a connection, as STOMP wants it. Our link hangs up by itself."""

    marks_redelivery: bool = True
    """Whether a redelivered message has `redelivered:true` after its consumer was lost."""


class Received(stomp.ConnectionListener):  # type: ignore[misc]
    """stomp.py's callbacks as queues, which a test can wait for."""

    def __init__(self) -> None:
        self.messages: queue.Queue[Any] = queue.Queue()
        self.receipts: queue.Queue[Any] = queue.Queue()
        self.errors: queue.Queue[Any] = queue.Queue()
        self.disconnected = threading.Event()

    def on_message(self, frame: Any) -> None:
        self.messages.put(frame)

    def on_receipt(self, frame: Any) -> None:
        self.receipts.put(frame)

    def on_error(self, frame: Any) -> None:
        self.errors.put(frame)

    def on_disconnected(self) -> None:
        self.disconnected.set()


class Library:
    """stomp.py as our agents set it up: bytes stay bytes, no delay before small segments, and our TLS."""

    def __init__(self, broker: BrokerUnderTest, heartbeats: tuple[int, int] = (0, 0)) -> None:
        self.received = Received()
        address = BrokerAddress(broker.host, broker.port, Tls(broker.ca) if broker.ca else None)
        self.connection = Stomp(address, heartbeats)
        self.connection.set_listener("received", self.received)
        self.connection.connect(broker.login, broker.passcode, wait=True)

    def message(self) -> Any:
        return self.received.messages.get(timeout=SECONDS)

    def subscribe(self, destination: str, ack: str, **headers: str) -> None:
        receipt = uuid.uuid4().hex
        self.connection.subscribe(destination, id="1", ack=ack, headers={"receipt": receipt, **headers})
        assert self.received.receipts.get(timeout=SECONDS).headers["receipt-id"] == receipt

    def close(self) -> None:
        if self.connection.is_connected():
            self.connection.disconnect()


class BrokerContract:
    """Give `broker` in a subclass whose name begins with Test."""

    @pytest.fixture
    def broker(self) -> BrokerUnderTest:
        """The broker under test."""
        raise NotImplementedError

    @pytest.fixture
    def destination(self) -> str:
        """A queue that no other test uses, because some brokers keep their queues."""
        return f"/queue/contract.{uuid.uuid4().hex}"

    @pytest.fixture
    def raw(self, broker: BrokerUnderTest) -> Iterator[RawStomp]:
        with logged_in(broker) as client:
            yield client

    @pytest.fixture
    def library(self, broker: BrokerUnderTest) -> Iterator[Library]:
        client = Library(broker)
        yield client
        client.close()

    # With the library that our agents use

    def test_library_send_and_receive(self, library: Library, destination: str) -> None:
        library.subscribe(destination, "auto")
        library.connection.send(destination, b"hello", content_type="application/json", headers={"kind": "run"})
        frame = library.message()
        assert frame.body == b"hello"
        assert frame.headers["kind"] == "run"
        assert frame.headers["content-type"] == "application/json"
        assert frame.headers["destination"] == destination

    def test_library_acknowledges_one_by_one(self, broker: BrokerUnderTest, destination: str) -> None:
        first, second = Library(broker), Library(broker)
        try:
            first.subscribe(destination, "client-individual")
            for body in (b"1", b"2", b"3"):
                second.connection.send(destination, body)
            frames = [first.message() for _ in range(3)]
            first.connection.ack(frames[1].headers["ack"], receipt="acknowledged")
            first.received.receipts.get(timeout=SECONDS)
            # Broken off, not disconnected: what is not acknowledged must come back.
            first.connection.transport.disconnect_socket()
            second.subscribe(destination, "client-individual")
            again = [second.message() for _ in range(2)]
            assert [frame.body for frame in again] == [b"1", b"3"]
            if broker.marks_redelivery:
                assert [frame.headers.get("redelivered") for frame in again] == ["true", "true"]
            for frame in again:
                second.connection.ack(frame.headers["ack"])
        finally:
            first.close()
            second.close()

    def test_library_bytes_and_headers_come_as_they_were_sent(self, library: Library, destination: str) -> None:
        body = bytes(range(256)) * 8
        value = "line\nline:back\\slash ä"
        library.subscribe(destination, "auto")
        library.connection.send(destination, body, headers={"odd": value})
        frame = library.message()
        assert frame.body == body
        assert frame.headers["odd"] == value

    def test_library_topic_reaches_all(self, broker: BrokerUnderTest) -> None:
        topic = f"/topic/contract.{uuid.uuid4().hex}"
        clients = [Library(broker) for _ in range(3)]
        try:
            for client in clients:
                client.subscribe(topic, "auto")
            clients[0].connection.send(topic, b"all")
            assert [client.message().body for client in clients] == [b"all"] * 3
        finally:
            for client in clients:
                client.close()

    def test_library_wrong_login(self, broker: BrokerUnderTest) -> None:
        wrong = attrs.evolve(broker, passcode="wrong")
        with pytest.raises(stomp.exception.ConnectFailedException):
            Library(wrong)

    def test_library_heart_beats_keep_a_quiet_connection(self, broker: BrokerUnderTest, destination: str) -> None:
        interval = broker.heart_beat_ms
        for _ in range(3):  # a machine that stands still for a moment is late with them
            client = Library(broker, heartbeats=(interval, interval))
            try:
                client.subscribe(destination, "auto")
                if client.received.disconnected.wait(interval * 5 / 1000):
                    continue
                client.connection.send(destination, b"still here")
                assert client.message().body == b"still here"
                return
            finally:
                client.close()
        raise AssertionError("a quiet connection is cut")

    def test_library_disconnect_receipt(self, library: Library) -> None:
        library.connection.disconnect(receipt="bye")
        assert library.received.receipts.get(timeout=SECONDS).headers["receipt-id"] == "bye"

    # With a bare socket

    def test_messages_keep_their_order(self, raw: RawStomp, destination: str) -> None:
        bodies = [b"%d" % number for number in range(300)]
        raw.send_bytes(b"".join(encode("SEND", {"destination": destination}, body) for body in bodies))
        subscribe(raw, destination, "auto")
        assert [raw.receive().body for _ in bodies] == bodies

    def test_every_frame_can_have_a_receipt(self, raw: RawStomp, destination: str) -> None:
        raw.send("SUBSCRIBE", {"id": "1", "destination": destination, "ack": "client-individual", "receipt": "a"})
        assert receipt(raw) == "a"
        raw.send("SEND", {"destination": destination, "receipt": "b:with colon"}, b"x")
        frames = {frame.command: frame for frame in (raw.receive(), raw.receive())}
        assert frames["RECEIPT"].headers["receipt-id"] == "b:with colon"
        raw.send("ACK", {"id": frames["MESSAGE"].headers["ack"], "receipt": "c"})
        assert receipt(raw) == "c"
        raw.send("UNSUBSCRIBE", {"id": "1", "receipt": "d"})
        assert receipt(raw) == "d"
        raw.send("DISCONNECT", {"receipt": "e"})
        assert receipt(raw) == "e"

    def test_unacknowledged_messages_return_in_order(
        self, broker: BrokerUnderTest, raw: RawStomp, destination: str
    ) -> None:
        for number in range(5):
            raw.send("SEND", {"destination": destination, "receipt": "s"}, b"%d" % number)
            receipt(raw)
        with logged_in(broker) as lost:
            subscribe(lost, destination, "client-individual")
            frames = [lost.receive() for _ in range(5)]
            lost.send("ACK", {"id": frames[2].headers["ack"], "receipt": "r"})
            receipt(lost)
        subscribe(raw, destination, "client-individual")
        assert [raw.receive().body for _ in range(4)] == [b"0", b"1", b"3", b"4"]
        assert raw.stays_silent(SILENCE)

    def test_prefetch_of_one(self, raw: RawStomp, destination: str) -> None:
        for body in (b"1", b"2"):
            raw.send("SEND", {"destination": destination}, body)
        one = {"prefetch-count": "1", "activemq.prefetchSize": "1"}
        subscribe(raw, destination, "client-individual", **one)
        first = raw.receive()
        assert raw.stays_silent(SILENCE)
        raw.send("ACK", {"id": first.headers["ack"]})
        assert raw.receive().body == b"2"

    def test_two_consumers_share_a_queue(self, broker: BrokerUnderTest, raw: RawStomp, destination: str) -> None:
        with logged_in(broker) as other:
            for client in (raw, other):
                subscribe(
                    client, destination, "client-individual", **{"prefetch-count": "1", "activemq.prefetchSize": "1"}
                )
            for body in (b"1", b"2"):
                raw.send("SEND", {"destination": destination}, body)
            assert {raw.receive().body, other.receive().body} == {b"1", b"2"}

    @pytest.mark.parametrize("body", [b"", b"\0", b"a\0b\0", bytes(range(256)), b"\n\nSEND\n\n\0"])
    def test_binary_bodies(self, raw: RawStomp, destination: str, body: bytes) -> None:
        subscribe(raw, destination, "auto")
        raw.send("SEND", {"destination": destination, "content-length": str(len(body))}, body)
        assert raw.receive().body == body

    def test_a_body_of_one_mebibyte(self, raw: RawStomp, destination: str) -> None:
        body = bytes(range(256)) * 4096
        subscribe(raw, destination, "auto")
        raw.send("SEND", {"destination": destination}, body)
        assert raw.receive().body == body

    def test_header_escapes(self, raw: RawStomp, destination: str) -> None:
        value = "a:b\\c\nd"
        subscribe(raw, destination, "auto")
        raw.send("SEND", {"destination": destination, "na:me": value}, b"x")
        assert raw.receive().headers["na:me"] == value

    def test_frames_in_small_and_in_joined_segments(self, raw: RawStomp, destination: str) -> None:
        subscribe(raw, destination, "auto")
        frames = b"\n".join(encode("SEND", {"destination": destination}, body) for body in (b"1", b"2", b"3"))
        for start in range(0, len(frames), 7):
            raw.send_bytes(frames[start : start + 7])
        assert [raw.receive().body for _ in range(3)] == [b"1", b"2", b"3"]

    def test_topic_has_no_memory(self, broker: BrokerUnderTest, raw: RawStomp) -> None:
        topic = f"/topic/contract.{uuid.uuid4().hex}"
        raw.send("SEND", {"destination": topic, "receipt": "1"}, b"before")
        receipt(raw)
        with logged_in(broker) as other:
            for client in (raw, other):
                subscribe(client, topic, "auto")
            raw.send("SEND", {"destination": topic}, b"now")
            assert (raw.receive().body, other.receive().body) == (b"now", b"now")

    def test_wrong_login_gets_an_error_or_is_cut(self, broker: BrokerUnderTest) -> None:
        with RawStomp(broker.host, broker.port, seconds=SECONDS, ca=broker.ca) as client:
            assert client.login(broker.login, "wrong").command == "ERROR"
            if broker.closes_after_error:
                assert client.is_closed(SECONDS)

    def test_broker_sends_heart_beats(self, broker: BrokerUnderTest) -> None:
        with RawStomp(broker.host, broker.port, seconds=SECONDS, ca=broker.ca) as client:
            answer = client.login(broker.login, broker.passcode, heart_beat=f"0,{broker.heart_beat_ms}")
            assert int(answer.headers["heart-beat"].partition(",")[0]) > 0
            beat = client.receive_bytes()
            assert beat and not beat.strip(b"\r\n")

    def test_a_client_without_its_heart_beats_is_given_up(self, broker: BrokerUnderTest) -> None:
        with RawStomp(broker.host, broker.port, seconds=SECONDS, ca=broker.ca) as client:
            client.login(broker.login, broker.passcode, heart_beat=f"{broker.heart_beat_ms},0")
            assert client.is_closed(SECONDS)

    def test_a_frame_over_the_limit_ends_only_its_own_connection(
        self, broker: BrokerUnderTest, raw: RawStomp, destination: str
    ) -> None:
        subscribe(raw, destination, "auto")
        with logged_in(broker) as client:
            size = broker.body_bytes * 2
            client.send_bytes(encode("SEND", {"destination": destination, "content-length": str(size)})[:-1])
            try:
                for _ in range(size // 65536):
                    client.send_bytes(b"x" * 65536)
                if not broker.limits_unfinished_bodies:
                    client.send_bytes(b"\0")
                    assert client.receive().command == "ERROR"
            except OSError:
                pass  # cut off while sending, which is as good
            if broker.closes_after_error:
                assert client.is_closed(SECONDS)
        raw.send("SEND", {"destination": destination}, b"fits")
        assert raw.receive().body == b"fits"

    def test_half_a_frame_is_never_delivered(self, broker: BrokerUnderTest, raw: RawStomp, destination: str) -> None:
        subscribe(raw, destination, "auto")
        with logged_in(broker) as client:
            client.send_bytes(encode("SEND", {"destination": destination}, b"half a frame")[:-5])
        assert raw.stays_silent(SILENCE)
        raw.send("SEND", {"destination": destination}, b"whole")
        assert raw.receive().body == b"whole"

    def test_an_unknown_command_is_an_error(self, broker: BrokerUnderTest, raw: RawStomp) -> None:
        raw.send("DANCE", {"receipt": "1"})
        assert raw.receive().command == "ERROR"
        if broker.closes_after_error:
            assert raw.is_closed(SECONDS)


def logged_in(broker: BrokerUnderTest) -> RawStomp:
    """A bare client after its CONNECTED."""
    client = RawStomp(broker.host, broker.port, seconds=SECONDS, ca=broker.ca)
    answer = client.login(broker.login, broker.passcode)
    assert answer.command == "CONNECTED", answer
    return client


def subscribe(client: RawStomp, destination: str, ack: str, **headers: str) -> None:
    """SUBSCRIBE, and wait until it is in force."""
    client.send("SUBSCRIBE", {"id": "1", "destination": destination, "ack": ack, "receipt": "subscribed", **headers})
    frames: list[RawFrame] = []
    while not frames or frames[-1].command != "RECEIPT":
        frames.append(client.receive())
        # Messages that overtake the receipt are put back for the test.
        assert frames[-1].command in ("RECEIPT", "MESSAGE"), frames[-1]
    client.put_back(frames[:-1])


def receipt(client: RawStomp) -> str:
    """The id of the RECEIPT that must come next."""
    frame = client.receive()
    assert frame.command == "RECEIPT", frame
    return frame.headers["receipt-id"]
