"""Copies between the guest's end and the host's, with an exchange disk, whatever becomes of the disk."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import reactor
from twisted.internet.threads import deferToThread

from common.errors import TransferError
from common.transfer import Sink, Source, scan
from guest_agent import exchange, file_port
from guest_agent.exchange import Exchange, ExchangeError
from guest_agent.file_port import FilePort
from host_agent.exchange import NAME, SIZE, make
from host_agent.exchange import Exchange as HostExchange
from host_agent.files_request import FilesRequest
from host_agent.files_service import FilesService, OpenCopy

TOKEN = "a-token"
DEADLINE = 60.0
HALF = SIZE // 2
LISTEN: Any = reactor.listenTCP  # typed for server factories of one kind only
LENGTHS = (0, 1, HALF - 1, 2 * HALF + 5000, 0, 123_457)  # of files: they end within a block, and the last block early


@attrs.define
class Host:
    """The file port of a guest that has an exchange disk, with one open copy."""

    folder: Path
    service: FilesService
    port: int
    copy: OpenCopy | None = None
    told: list[int] = attrs.field(factory=list)

    @property
    def disk(self) -> Path:
        return self.folder / NAME

    def open(self, path: Path, *, inwards: bool) -> None:
        def progress(done: int, total: int) -> None:
            self.told.append(done)

        self.copy = self.service.open_copy(TOKEN, "c-1", "guest", path, inwards=inwards, progress=progress)

    @contextlib.contextmanager
    def connected(self) -> Iterator[FilePort]:
        with contextlib.closing(Exchange(str(self.disk))) as disk:
            port = FilePort(("127.0.0.1", self.port), TOKEN, disk)
            with contextlib.closing(port):
                yield port


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(exchange, "DIRECT", 0)  # the file is in any file system
    monkeypatch.setattr(file_port, "is_emulated", lambda: True)
    make(tmp_path / NAME)
    service = FilesService(reactor)
    listening = LISTEN(0, service.factory_for("guest", HostExchange(tmp_path / NAME)), interface="127.0.0.1")
    host = Host(tmp_path, service, listening.getHost().port)
    yield host
    if host.copy is not None:
        service.close_copy(host.copy)
    listening.stopListening()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    root.mkdir()
    for number, length in enumerate(LENGTHS):
        (root / f"file-{number}").write_bytes(random.Random(number).randbytes(length))
    return root


def contents(tree: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in tree.iterdir()}


def sha256(tree: Path) -> str:
    return hashlib.sha256(
        scan(tree).to_json() + b"".join(data for _, data in sorted(contents(tree).items()))
    ).hexdigest()


def fetch(host: Host, target: Path) -> str:
    """As the guest does; the SHA-256."""
    with host.connected() as port:
        manifest = port.get_manifest()
        assert port.way == "sha-512"
        sink = Sink(target, manifest, "c-1", (port.way,))
        digest, found = port.download(sink)
        sink.finish(digest)
        return found


def send(host: Host, source: Path) -> str:
    with host.connected() as port:
        return port.upload(source, scan(source))


async def copy(host: Host, tree: Path, inwards: bool) -> None:
    """One of the two directions, and all of it is right."""
    there = host.folder / "there"
    host.open(tree if inwards else there, inwards=inwards)
    done = deferToThread(fetch, host, there) if inwards else deferToThread(send, host, tree)
    assert await done.addTimeout(DEADLINE, reactor) == sha256(tree)
    assert contents(there) == contents(tree)


def streamed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that came over connections, in each direction as they come."""
    found: list[int] = []
    fill, put_rest = file_port._Stream.fill, FilePort._put_rest

    def count_in(stream: Any, view: memoryview, last: bool) -> int:
        found.append(len(view))
        return fill(stream, view, last)

    def count_out(port: FilePort, blocks: Any, offset: int, total: int) -> int:
        found.append(total - offset)
        return put_rest(port, blocks, offset, total)

    monkeypatch.setattr(file_port._Stream, "fill", count_in)
    monkeypatch.setattr(FilePort, "_put_rest", count_out)
    return found


@ensureDeferred
async def test_all_bytes_go_by_the_disk(host: Host, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = streamed(monkeypatch)
    monkeypatch.delattr(Source, "skip_to")  # nothing is read again
    host.open(tree, inwards=True)
    there = host.folder / "there"
    assert await deferToThread(fetch, host, there) == sha256(tree)
    assert contents(there) == contents(tree)
    assert sum(found) == 128 + 64, "the digests alone"
    assert host.told[-1] == sum(LENGTHS)
    assert host.copy is not None
    host.service.close_copy(host.copy)

    del found[:]
    back = host.folder / "back"
    host.open(back, inwards=False)
    assert await deferToThread(send, host, there) == sha256(tree)
    assert contents(back) == contents(tree)
    assert found == []
    assert host.told[-1] == sum(LENGTHS)


@ensureDeferred
async def test_small_copies_do_not_go_by_the_disk(host: Host, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = streamed(monkeypatch)
    (tree / "file-3").unlink()
    (tree / "file-2").unlink()
    host.open(tree, inwards=True)
    assert await deferToThread(fetch, host, host.folder / "there") == sha256(tree)
    assert sum(found) == 1 + 123_457 + 128 + 64


@pytest.mark.parametrize("reads", [0, 1])
@ensureDeferred
async def test_a_machine_that_is_restored_after_an_answer_takes_nothing_of_what_lies_there_then(
    host: Host, tree: Path, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.open(tree, inwards=True)
    read = Exchange.read
    done: list[int] = []

    def read_after_restore(disk: Exchange, place: int, count: int) -> memoryview:
        if len(done) == reads:
            host.disk.write_bytes(bytes(SIZE))
        done.append(place)
        return read(disk, place, count)

    monkeypatch.setattr(Exchange, "read", read_after_restore)
    found = streamed(monkeypatch)
    assert await deferToThread(fetch, host, host.folder / "there") == sha256(tree)
    assert contents(host.folder / "there") == contents(tree)
    assert sum(found) == sum(LENGTHS) - reads * HALF + 128 + 64, "what was right counts"


@pytest.mark.parametrize("inwards", [True, False])
@ensureDeferred
async def test_a_disk_that_fails_in_the_middle(
    host: Host, tree: Path, inwards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "read" if inwards else "write"
    whole = getattr(Exchange, name)
    done: list[int] = []

    def fail_later(disk: Exchange, place: int, what: Any) -> Any:
        if done:
            raise ExchangeError("Input/output error")
        done.append(place)
        return whole(disk, place, what)

    monkeypatch.setattr(Exchange, name, fail_later)
    found = streamed(monkeypatch)
    await copy(host, tree, inwards)
    assert 0 < sum(found) <= sum(LENGTHS)


@pytest.mark.parametrize("inwards", [True, False])
@ensureDeferred
async def test_the_host_s_file_is_gone(host: Host, tree: Path, inwards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host refuses then, and the rest goes over the connection."""
    exchanged = FilePort._exchanged

    def gone(port: FilePort) -> bytes:
        host.disk.unlink(missing_ok=True)
        return exchanged(port)

    monkeypatch.setattr(FilePort, "_exchanged", gone)
    await copy(host, tree, inwards)


@pytest.mark.parametrize("inwards", [True, False])
@ensureDeferred
async def test_connections_that_break(host: Host, tree: Path, inwards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time after some answers; what comes then goes by the disk again."""
    exchanged, done = FilePort._exchanged, []

    def break_often(port: FilePort) -> bytes:
        done.append(1)
        if len(done) % 3 == 0:
            port.interrupt()
        return exchanged(port)

    monkeypatch.setattr(FilePort, "_exchanged", break_often)
    found = streamed(monkeypatch)
    await copy(host, tree, inwards)
    assert sum(found) < HALF, "less than what is worth the disk"
    assert len(done) >= 3


@ensureDeferred
async def test_a_file_that_changes_while_it_is_copied(host: Host, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host agent that is started anew reads another beginning: of no one time is what came, and it is dropped."""
    host.open(tree, inwards=True)
    exchanged = FilePort._exchanged

    def change(port: FilePort) -> bytes:
        body = exchanged(port)
        assert host.copy is not None
        (tree / "file-2").write_bytes(bytes(LENGTHS[2]))
        host.copy.source = None
        return body

    monkeypatch.setattr(FilePort, "_exchanged", change)
    with pytest.raises(TransferError, match="arrived altered"):
        await deferToThread(fetch, host, host.folder / "there")
    assert not (host.folder / "there").exists()


@ensureDeferred
async def test_a_host_without_the_disk_or_without_the_digest(
    host: Host, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an earlier version is."""
    monkeypatch.setattr(FilesRequest, "_say_what_we_can", lambda request: None)
    monkeypatch.setattr(FilesRequest, "_ways", lambda request: ("sha-256",))
    host.open(tree, inwards=True)

    def fetch_and_see() -> str:
        with host.connected() as port:
            manifest = port.get_manifest()
            assert port.way == "sha-256"
            sink = Sink(host.folder / "there", manifest, "c-1", (port.way,))
            digest, found = port.download(sink)
            assert sink.finish(digest) == found
            return found

    assert await deferToThread(fetch_and_see) == sha256(tree)
    assert host.copy is not None
    host.service.close_copy(host.copy)
    host.open(host.folder / "back", inwards=False)
    assert await deferToThread(send, host, host.folder / "there") == sha256(tree)
    assert contents(host.folder / "back") == contents(tree)


def test_the_disk_is_known_by_its_serial_number(tmp_path: Path) -> None:
    for name, serial in (("loop0", None), ("vda", ""), ("vdb", "vmwrapper-exchange\n")):
        (tmp_path / name).mkdir()
        if serial is not None:
            (tmp_path / name / "serial").write_text(serial)
    assert exchange.find(str(tmp_path)) == "/dev/vdb"
    (tmp_path / "vdb" / "serial").write_text("another")
    assert exchange.find(str(tmp_path)) is None
    assert exchange.find(str(tmp_path / "none")) is None
