"""The way out of a VM: an HTTP proxy at the guest's gateway, for jobs that ask for the network.

It is the only way: the VM's own network reaches nothing but its service ports. A guest may ask for names and public
addresses; this host, its networks and other machines near it are refused, whatever name leads there. Closed until the
client allows the network, and closed again, with all connections broken, when it does not any more. Bytes are counted,
and flow no faster than the volunteer wishes.

    CONNECT host:port          a tunnel, for TLS
    GET http://host/path …     passed on to the host as `GET /path`, one request for each connection
"""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit

import attrs
import psutil
from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, connectProtocol
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from common.errors import VMwrapperError

from .rate import Rate, Tap

HEAD_MOST = 16 * 1024  # bytes of a request's head
CONNECT_DEADLINE = 30.0  # seconds
HEAD_DEADLINE = 30.0
MOST_CONNECTIONS = 64  # of one VM
PORTS = frozenset({80, 443})  # others are mail, and attacks


class Refused(VMwrapperError):
    """A request that is not passed on; `status` is HTTP's."""

    def __init__(self, status: str, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@attrs.define(eq=False)
class Outward(Factory):
    """One VM's way out. `sent` and `received` are bytes, seen from the guest."""

    noisy = False
    _reactor: Any
    open: bool = False
    sent: int = 0
    received: int = 0
    _connections: set[_FromGuest] = attrs.field(factory=set)
    _up: Rate = attrs.field(init=False)
    _down: Rate = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._up, self._down = Rate(self._reactor), Rate(self._reactor)

    def limit(self, up_bytes_s: float | None, down_bytes_s: float | None) -> None:
        """How fast it may send and receive, over all connections. 0: no limit; None: as before."""
        changed = [
            rate.change(wanted)
            for rate, wanted in ((self._up, up_bytes_s), (self._down, down_bytes_s))
            if wanted is not None
        ]
        if any(changed):
            for connection in self._connections:
                connection.wait_no_longer()

    def was_sent(self, count: int) -> float:
        """Count bytes of the guest's; returns the seconds that it has to wait for them."""
        self.sent += count
        return self._up.take(count)

    def was_received(self, count: int) -> float:
        """The same of bytes for the guest."""
        self.received += count
        return self._down.take(count)

    def buildProtocol(self, addr: object) -> _FromGuest | None:
        if not self.open or len(self._connections) >= MOST_CONNECTIONS:
            return None  # refused: the connection is closed at once
        return _FromGuest(self)

    def switch(self, on: bool) -> None:
        """Open it, or close it and break what is under way."""
        self.open = on
        if not on:
            for connection in list(self._connections):
                connection.abort()

    def tap(self, side: Protocol) -> Tap:
        """Of what comes from one of the two sides of a connection."""
        return Tap(self._reactor, side.transport)

    async def connect(self, target: Target, protocol: Protocol) -> None:
        """Connect to a public address. Raises Refused."""
        if target.port not in PORTS:
            raise Refused("403 Forbidden", f"only the ports {sorted(PORTS)} are passed on")
        addresses = await self._addresses(target.host)
        ours = {each.address for link in psutil.net_if_addrs().values() for each in link}
        public = [address for address in addresses if is_public(address) and address not in ours]
        if not public:
            raise Refused("403 Forbidden", f"{target.host} is not a public address")
        try:
            # To the address that was looked at: the name may lead elsewhere the next time.
            endpoint = HostnameEndpoint(self._reactor, public[0], target.port, timeout=CONNECT_DEADLINE)
            await connectProtocol(endpoint, protocol)
        except Exception as error:
            raise Refused("502 Bad Gateway", f"{target.host} cannot be reached: {error}") from None

    async def _addresses(self, host: str) -> list[str]:
        try:
            return [str(ipaddress.ip_address(host))]
        except ValueError:
            pass  # a name
        found: list[str] = []
        done: Deferred[None] = Deferred()

        class Receiver:
            def resolutionBegan(self, resolution: object) -> None:
                pass

            def addressResolved(self, address: Any) -> None:
                found.append(address.host)

            def resolutionComplete(self) -> None:
                if not done.called:
                    done.callback(None)

        self._reactor.nameResolver.resolveHostName(Receiver(), host)
        try:
            await done.addTimeout(CONNECT_DEADLINE, self._reactor)
        except defer.TimeoutError:
            raise Refused("504 Gateway Timeout", f"the name {host} is not found in time") from None
        return found


def is_public(address: str) -> bool:
    """Whether an address is out in the world, and not this host or something near it."""
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    return found.is_global and not found.is_multicast and (mapped is None or is_public(str(mapped)))


@attrs.frozen
class Target:
    """Where a request goes, and what is sent there first."""

    host: str
    port: int
    head: bytes  # empty: a tunnel


def target_of(head: bytes) -> Target:
    """Read a request's head (with its empty line). Raises Refused."""
    bad = Refused("400 Bad Request", "that is no request for a proxy")
    try:
        line, _, rest = head.partition(b"\r\n")
        method, where, version = line.decode("ascii").split(" ")
        parts = urlsplit(f"//{where}" if method == "CONNECT" else where)
        port = parts.port
    except ValueError:
        raise bad from None
    if not version.startswith("HTTP/1.") or not parts.hostname or parts.username is not None:
        raise bad
    if method == "CONNECT":
        return Target(parts.hostname, port or 443, b"")
    if parts.scheme != "http":
        raise bad
    kept = [each for each in rest.split(b"\r\n") if not each.lower().startswith((b"proxy-", b"connection:"))]
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    lines = [f"{method} {path} {version}".encode("ascii"), b"Connection: close", *(each for each in kept if each)]
    return Target(parts.hostname, port or 80, b"\r\n".join([*lines, b"", b""]))


class _Side(Protocol):
    """One of the two connections that are joined."""

    tap: Tap | None = None  # of what comes from here, once they are

    def hang_up(self) -> None:
        """The other side has; what is on its way still goes out."""
        if self.transport is not None:
            transport: Any = self.transport
            transport.unregisterProducer()
            transport.loseConnection()

    def abort(self) -> None:
        if self.transport is not None:
            transport: Any = self.transport
            transport.abortConnection()


class _FromGuest(_Side):
    """A guest's connection: first a request, then whatever follows."""

    _log = Logger()

    def __init__(self, outward: Outward) -> None:
        self._outward = outward
        self._head = b""
        self._asked = False
        self._early = b""  # what follows the head before the other side is there
        self.other: _ToWorld | None = None

    def connectionMade(self) -> None:
        self._outward._connections.add(self)
        self._late = self._outward._reactor.callLater(HEAD_DEADLINE, self.abort)

    def dataReceived(self, data: bytes) -> None:
        wait_s = self._outward.was_sent(len(data))
        if self.other is not None and self.tap is not None:
            self.tap.wait(wait_s)
            self.other.write(data)
        elif self._asked:
            self._early += data
            if len(self._early) > HEAD_MOST:
                self.abort()
        else:
            self._head += data
            head, end, rest = self._head.partition(b"\r\n\r\n")
            if end:
                self._asked, self._early = True, rest
                self._late.cancel()
                Deferred.fromCoroutine(self._serve(head + end)).addErrback(self._failed)
            elif len(self._head) > HEAD_MOST:
                self.abort()

    async def _serve(self, head: bytes) -> None:
        try:
            target = target_of(head)
            other = _ToWorld(self, self._outward)
            await self._outward.connect(target, other)
        except Refused as error:
            self._answer(error.status, f"{error}\n".encode("utf-8", "replace"))
            return
        if self not in self._outward._connections or self.transport is None:
            other.abort()
            return
        if not target.head:
            self.transport.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        other.write(target.head + self._early)
        self.other, self._early = other, b""
        self.tap, other.tap = self._outward.tap(self), self._outward.tap(other)
        transport: Any = self.transport
        transport.registerProducer(other.tap, True)
        other.push_to(self.tap)

    def _failed(self, failure: Failure) -> None:
        self._log.failure("a guest's request failed", failure)
        self._answer("500 Internal Server Error", b"the proxy failed: its log says why\n")

    def _answer(self, status: str, body: bytes) -> None:
        if self.transport is not None:
            head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n\r\n"
            self.transport.write(head.encode("ascii") + body)
            self.transport.loseConnection()

    def received(self, data: bytes) -> None:
        """From the world."""
        wait_s = self._outward.was_received(len(data))
        if self.other is not None and self.other.tap is not None:
            self.other.tap.wait(wait_s)
        if self.transport is not None:
            self.transport.write(data)

    def wait_no_longer(self) -> None:
        """For bytes to be paid for: there is another limit."""
        for side in (self, self.other):
            if side is not None and side.tap is not None:
                side.tap.wait_no_longer()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._outward._connections.discard(self)
        if self.tap is not None:
            self.tap.close()
        if self._late.active():
            self._late.cancel()
        if self.other is not None:
            self.other.hang_up()


class _ToWorld(_Side):
    """The connection to a public address."""

    def __init__(self, guest: _FromGuest, outward: Outward) -> None:
        self._guest = guest
        self._outward = outward

    def write(self, data: bytes) -> None:
        if self.transport is not None and data:
            self.transport.write(data)

    def push_to(self, producer: Tap) -> None:
        """Hold the guest back when the world is slower."""
        transport: Any = self.transport
        transport.registerProducer(producer, True)

    def dataReceived(self, data: bytes) -> None:
        self._guest.received(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self.tap is not None:
            self.tap.close()
        self._guest.hang_up()
