"""The way out of a VM: what is passed on, what is refused, and that it can be closed at any moment."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import attrs
import psutil
import pytest
import pytest_twisted
from pytest_twisted import ensureDeferred
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import Clock, deferLater
from twisted.protocols.wire import Echo
from twisted.python.failure import Failure

from host_agent import outward
from host_agent.outward import Outward, Refused, Target, is_public, target_of
from host_agent.rate import Rate

reactor: Any = _reactor
DEADLINE = 60.0


class Guest(Protocol):
    """A program in the guest."""

    def __init__(self) -> None:
        self.heard = b""
        self.ended: Deferred[None] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        self.heard += data

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.ended.callback(None)

    def say(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)

    async def hears(self, wanted: bytes) -> None:
        for _ in range(int(DEADLINE / 0.02)):
            if wanted in self.heard:
                return
            await deferLater(reactor, 0.02)
        raise AssertionError(self.heard)


class Web(Protocol):
    """A server out there: tells what it was asked."""

    def dataReceived(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(b"HTTP/1.1 200 OK\r\n\r\nasked: " + data)
        self.transport.loseConnection()


@attrs.define
class Site:
    out: Outward
    port: int
    world: int = 0

    async def guest(self) -> Guest:
        guest = Guest()
        await connectProtocol(TCP4ClientEndpoint(reactor, "127.0.0.1", self.port), guest)
        return guest


@pytest_twisted.async_yield_fixture
async def site(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    out = Outward(reactor)
    listening = reactor.listenTCP(0, out, interface="127.0.0.1")
    yield Site(out, listening.getHost().port)
    out.switch(False)
    await listening.stopListening()


@pytest_twisted.async_yield_fixture
async def world(site: Site, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    """With a server that counts as public, though it is here."""
    listening = reactor.listenTCP(0, Factory.forProtocol(request.param), interface="127.0.0.1")
    site.world = listening.getHost().port
    monkeypatch.setattr(outward, "PORTS", frozenset({site.world}))
    monkeypatch.setattr(outward, "is_public", lambda address: address == "127.0.0.1")
    monkeypatch.setattr(psutil, "net_if_addrs", dict)
    site.out.switch(True)
    yield site
    site.out.switch(False)
    await listening.stopListening()


@pytest.mark.parametrize("world", [Echo], indirect=True)
@ensureDeferred
async def test_a_tunnel_and_what_is_counted(world: Site) -> None:
    guest = await world.guest()
    head = f"CONNECT localhost:{world.world} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    guest.say(head + b"early")
    await guest.hears(b"HTTP/1.1 200 Connection established\r\n\r\nearly")
    guest.say(b"x" * 100_000)
    await guest.hears(b"x" * 100_000)
    assert world.out.sent == len(head) + 5 + 100_000
    assert world.out.received == 5 + 100_000


@pytest.mark.parametrize("world", [Echo], indirect=True)
@pytest.mark.parametrize("limits", [(1.0, 0.0), (0.0, 1.0)])
@ensureDeferred
async def test_a_limit_holds_the_bytes_back_until_it_is_lifted(world: Site, limits: tuple[float, float]) -> None:
    """At a byte a second this would take a week."""
    guest = await world.guest()
    guest.say(f"CONNECT 127.0.0.1:{world.world} HTTP/1.1\r\n\r\n".encode())
    await guest.hears(b"established")
    world.out.limit(*limits)
    guest.say(b"x" * 600_000)
    for _ in range(30):
        await deferLater(reactor, 0.02)
    assert 0 < world.out.sent
    assert len(guest.heard) < 400_000
    world.out.limit(None, None)
    assert len(guest.heard) < 400_000
    world.out.limit(0.0, 0.0)
    await guest.hears(b"x" * 600_000)


@pytest.mark.parametrize("world", [Echo], indirect=True)
@ensureDeferred
async def test_bytes_flow_as_fast_as_the_limit_says(world: Site) -> None:
    guest = await world.guest()
    guest.say(f"CONNECT 127.0.0.1:{world.world} HTTP/1.1\r\n\r\n".encode())
    await guest.hears(b"established")
    world.out.limit(100_000.0, 0.0)
    began = reactor.seconds()
    guest.say(b"x" * 200_000)
    await guest.hears(b"x" * 200_000)
    assert reactor.seconds() - began > 1.3, "all but what is read at once, 64 KiB, had to be paid for"


def test_those_who_share_a_rate_wait_for_one_another() -> None:
    clock = Clock()
    rate = Rate(clock)
    assert rate.take(1000) == 0
    assert rate.change(100.0)
    assert [rate.take(50), rate.take(50)] == [0.5, 1.0]
    clock.advance(3)
    assert rate.take(50) == 0.5


@pytest.mark.parametrize("world", [Echo], indirect=True)
@ensureDeferred
async def test_closing_it_breaks_what_is_under_way(world: Site) -> None:
    guest = await world.guest()
    guest.say(f"CONNECT 127.0.0.1:{world.world} HTTP/1.1\r\n\r\n".encode())
    await guest.hears(b"200")
    world.out.switch(False)
    await guest.ended.addTimeout(DEADLINE, reactor)
    again = await world.guest()
    await again.ended.addTimeout(DEADLINE, reactor)
    assert again.heard == b""
    world.out.switch(True)
    third = await world.guest()
    third.say(f"CONNECT 127.0.0.1:{world.world} HTTP/1.1\r\n\r\n".encode())
    await third.hears(b"200")


@pytest.mark.parametrize("world", [Web], indirect=True)
@ensureDeferred
async def test_a_plain_request(world: Site) -> None:
    guest = await world.guest()
    place = f"127.0.0.1:{world.world}"
    guest.say(
        f"GET http://{place}/a/b?c=d HTTP/1.1\r\nHost: {place}\r\nProxy-Authorization: x\r\n"
        f"Connection: keep-alive\r\nAccept: */*\r\n\r\n".encode()
    )
    await guest.ended.addTimeout(DEADLINE, reactor)
    asked = f"GET /a/b?c=d HTTP/1.1\r\nConnection: close\r\nHost: {place}\r\nAccept: */*\r\n\r\n"
    assert guest.heard == b"HTTP/1.1 200 OK\r\n\r\nasked: " + asked.encode()


@ensureDeferred
async def test_it_is_closed_until_it_is_opened(site: Site) -> None:
    guest = await site.guest()
    guest.say(b"CONNECT example.org:443 HTTP/1.1\r\n\r\n")
    await guest.ended.addTimeout(DEADLINE, reactor)
    assert guest.heard == b""
    assert site.out.sent == 0


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("CONNECT 127.0.0.1:443 HTTP/1.1", "403 Forbidden"),
        ("CONNECT localhost:443 HTTP/1.1", "403 Forbidden"),
        ("CONNECT [::1]:443 HTTP/1.1", "403 Forbidden"),
        ("CONNECT 10.0.2.2:443 HTTP/1.1", "403 Forbidden"),
        ("CONNECT 192.168.1.1:443 HTTP/1.1", "403 Forbidden"),
        ("CONNECT 169.254.169.254:80 HTTP/1.1", "403 Forbidden"),
        ("CONNECT 1.1.1.1:25 HTTP/1.1", "403 Forbidden"),
        ("GET http://127.0.0.1/ HTTP/1.1", "403 Forbidden"),
        ("GET ftp://example.org/ HTTP/1.1", "400 Bad Request"),
        ("GET / HTTP/1.1", "400 Bad Request"),
        ("nonsense", "400 Bad Request"),
        ("CONNECT a:99999 HTTP/1.1", "400 Bad Request"),
    ],
)
@ensureDeferred
async def test_what_is_refused(site: Site, request_line: str, status: str) -> None:
    site.out.switch(True)
    guest = await site.guest()
    guest.say(f"{request_line}\r\nHost: x\r\n\r\n".encode())
    await guest.ended.addTimeout(DEADLINE, reactor)
    assert guest.heard.startswith(f"HTTP/1.1 {status}\r\n".encode()), guest.heard


@ensureDeferred
async def test_this_hosts_own_public_address(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outward, "is_public", lambda address: True)
    site.out.switch(True)
    guest = await site.guest()
    guest.say(b"CONNECT 127.0.0.1:443 HTTP/1.1\r\n\r\n")
    await guest.ended.addTimeout(DEADLINE, reactor)
    assert guest.heard.startswith(b"HTTP/1.1 403 ")


@ensureDeferred
async def test_a_fault_of_ours_is_an_answer_too(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(address: str) -> bool:
        raise RuntimeError(address)

    monkeypatch.setattr(outward, "is_public", broken)
    site.out.switch(True)
    guest = await site.guest()
    guest.say(b"CONNECT 127.0.0.1:443 HTTP/1.1\r\n\r\n")
    await guest.ended.addTimeout(DEADLINE, reactor)
    assert guest.heard.startswith(b"HTTP/1.1 500 ")


@ensureDeferred
async def test_a_head_without_an_end(site: Site) -> None:
    site.out.switch(True)
    guest = await site.guest()
    guest.say(b"GET http://example.org/" + b"a" * outward.HEAD_MOST)
    await guest.ended.addTimeout(DEADLINE, reactor)
    assert guest.heard == b""


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("1.1.1.1", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("2002:7f00:1::", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_targets() -> None:
    assert target_of(b"CONNECT example.org:443 HTTP/1.1\r\n\r\n") == Target("example.org", 443, b"")
    assert target_of(b"GET http://example.org HTTP/1.0\r\n\r\n").head == b"GET / HTTP/1.0\r\nConnection: close\r\n\r\n"
    with pytest.raises(Refused):
        target_of(b"GET http://user@example.org/ HTTP/1.1\r\n\r\n")
