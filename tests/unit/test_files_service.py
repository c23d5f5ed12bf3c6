"""The file port by real connections: what is taken as it comes, what is refused, and what a guest is told then."""

from __future__ import annotations

import hashlib
import http.client
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread

from common.errors import TransferError
from common.transfer import Sink, scan
from host_agent.exchange import SIZE, Exchange, make
from host_agent.files_request import PIECE
from host_agent.files_service import FilesService, OpenCopy

TOKEN = "a-token"
DEADLINE = 30.0
LISTEN: Any = reactor.listenTCP  # typed for server factories of one kind only
CONTENT = bytes(range(256)) * 4 * 1024  # 1 MiB, some pieces


class Port:
    """The service on a real port, a copy out of a guest, and what was said of its progress."""

    def __init__(self, folder: Path) -> None:
        self.service = FilesService(reactor)
        self.told: list[int] = []
        self.waiting: list[tuple[int, Deferred[None]]] = []
        self.target = folder / "back"
        self.source = folder / "source"
        self.source.write_bytes(CONTENT)
        self.manifest = scan(self.source)
        self.copy: OpenCopy = self.service.open_copy(
            TOKEN, "c-1", "guest", self.target, inwards=False, progress=self._progress
        )
        self.listening = LISTEN(0, self.service.factory_for("guest"), interface="127.0.0.1")

    def _progress(self, done: int, total: int) -> None:
        assert total == len(CONTENT)
        self.told.append(done)
        for count, waiter in list(self.waiting):
            if done >= count:
                self.waiting.remove((count, waiter))
                waiter.callback(None)

    def has(self, count: int) -> Deferred[None]:
        waiter: Deferred[None] = Deferred()
        self.waiting.append((count, waiter))
        return waiter.addTimeout(DEADLINE, reactor)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.listening.getHost().port, timeout=DEADLINE)

    def close(self) -> None:
        self.service.close_copy(self.copy)
        self.listening.stopListening()


@pytest.fixture
def port(tmp_path: Path) -> Iterator[Port]:
    made = Port(tmp_path)
    yield made
    made.close()


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes = b"", **headers: str
) -> tuple[int, bytes]:
    connection.request(method, path, body, {"Authorization": f"Bearer {TOKEN}", **headers})
    response = connection.getresponse()
    return response.status, response.read()


def begin_data(connection: http.client.HTTPConnection, start: int) -> None:
    connection.putrequest("PUT", "/data")
    connection.putheader("Authorization", f"Bearer {TOKEN}")
    connection.putheader("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
    connection.putheader("Content-Length", str(len(CONTENT) - start))
    connection.endheaders()


def answer(connection: http.client.HTTPConnection) -> tuple[int, bytes]:
    response = connection.getresponse()
    return response.status, response.read()


async def where(port: Port, connection: http.client.HTTPConnection) -> int:
    status, body = await deferToThread(ask, connection, "PUT", "/manifest", port.manifest.to_json())
    assert status == 200
    return int(json.loads(body)["offset"])


@ensureDeferred
async def test_what_comes_counts_at_once_and_goes_on_after_a_break(port: Port) -> None:
    connection, half = port.connect(), PIECE
    assert await where(port, connection) == 0
    there = port.has(half)
    begin_data(connection, 0)
    connection.send(CONTENT[:half])
    await there  # though its request has not ended
    assert port.told == sorted(set(port.told))
    assert all(after - before >= PIECE for before, after in zip([0, *port.told], port.told, strict=False))
    connection.close()

    again = port.connect()
    assert await where(port, again) == half
    begin_data(again, half)
    await deferToThread(again.send, CONTENT[half:])
    assert await deferToThread(answer, again) == (200, b'{"offset": %d}' % len(CONTENT))
    digest = hashlib.sha256(port.manifest.to_json() + CONTENT).hexdigest()
    assert await deferToThread(ask, again, "POST", "/done", digest.encode()) == (200, digest.encode())
    assert port.target.read_bytes() == CONTENT
    again.close()


@ensureDeferred
async def test_bytes_from_the_wrong_place_break_their_connection(port: Port) -> None:
    for known in (False, True):
        connection = port.connect()
        if known:
            assert await where(port, connection) == 0
        begin_data(connection, 5)
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            await deferToThread(answer, connection)
        connection.close()
    assert port.told == []


@ensureDeferred
async def test_an_earlier_connection_adds_nothing_to_what_goes_on_elsewhere(port: Port) -> None:
    """Not even where a file ends, and the next one would be opened for it."""
    source = port.source.with_name("tree")
    source.mkdir()
    for name, content in (("a", CONTENT[:PIECE]), ("b", CONTENT[PIECE:])):
        (source / name).write_bytes(content)
    port.manifest = scan(source)
    old, new = port.connect(), port.connect()
    assert await where(port, old) == 0
    there = port.has(PIECE)
    begin_data(old, 0)
    old.send(CONTENT[:PIECE])
    await there
    assert await where(port, new) == PIECE
    old.send(b"other bytes")
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        await deferToThread(answer, old)
    assert sorted(path.stat().st_size for path in port.target.parent.glob(".back.*/*")) == [0, PIECE]
    assert await where(port, new) == PIECE
    old.close()
    new.close()


@ensureDeferred
async def test_why_nothing_more_can_be_taken_is_said_to_the_next_request(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(sink: Sink, data: bytes) -> None:
        raise TransferError("the disk is full")

    monkeypatch.setattr(Sink, "write", full)
    connection, again = port.connect(), port.connect()
    assert await where(port, connection) == 0
    begin_data(connection, 0)
    connection.send(CONTENT[:PIECE])
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        await deferToThread(answer, connection)
    assert await deferToThread(ask, again, "PUT", "/manifest", port.manifest.to_json()) == (422, b"the disk is full")
    connection.close()
    again.close()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda headers: headers.update(Authorization="Bearer another"), 404),
        (lambda headers: headers.update(Authorization=TOKEN), 404),
        (lambda headers: headers.update(Authorization=f"Basic {TOKEN}"), 404),
        (lambda headers: None, 400),  # data without its range
    ],
)
@ensureDeferred
async def test_what_is_refused(port: Port, change: Callable[[dict[str, str]], None], expected: int) -> None:
    connection = port.connect()
    headers = {"Authorization": f"Bearer {TOKEN}"}
    change(headers)
    connection.request("PUT", "/data", b"data", headers)
    assert (await deferToThread(answer, connection))[0] == expected
    connection.close()


@ensureDeferred
async def test_the_end_of_a_copy_that_this_host_agent_does_not_know_is_a_conflict(port: Port) -> None:
    connection = port.connect()
    assert (await deferToThread(ask, connection, "POST", "/done", b"0" * 64))[0] == 409
    assert (await deferToThread(ask, connection, "GET", "/data"))[0] == 404, "it is a copy out of the guest"
    connection.close()


def test_a_file_port_that_nobody_uses_has_no_timer(tmp_path: Path) -> None:
    """There is one for every VM: a timer a second was most of what a guest that does nothing cost its host."""
    clock: Any = reactor
    factory = FilesService(reactor).factory_for("guest")
    before = set(clock.getDelayedCalls())
    factory.doStart()
    assert set(clock.getDelayedCalls()) == before
    factory.doStop()


@pytest.mark.parametrize("place", ["-1", "x", "", str(SIZE - 5), str(2**70)])
@ensureDeferred
async def test_places_that_the_exchange_disk_does_not_have(port: Port, place: str, tmp_path: Path) -> None:
    make(tmp_path / "disk")
    listening = LISTEN(0, port.service.factory_for("guest", Exchange(tmp_path / "disk")), interface="127.0.0.1")
    connection = http.client.HTTPConnection("127.0.0.1", listening.getHost().port, timeout=DEADLINE)
    assert await where(port, connection) == 0
    content_range = f"bytes 0-9/{len(CONTENT)}"
    headers = {"Exchange": place, "Content-Range": content_range}
    status, body = await deferToThread(lambda: ask(connection, "PUT", "/data", b"", **headers))
    assert status == 422
    assert b"exchange disk" in body
    assert await where(port, connection) == 0
    connection.close()
    listening.stopListening()


@ensureDeferred
async def test_a_guest_without_an_exchange_disk_has_no_place_on_one(port: Port) -> None:
    connection = port.connect()
    assert await where(port, connection) == 0
    headers = {"Exchange": "0", "Content-Range": f"bytes 0-9/{len(CONTENT)}"}
    status, _ = await deferToThread(lambda: ask(connection, "PUT", "/data", b"", **headers))
    assert status == 422
    connection.close()
