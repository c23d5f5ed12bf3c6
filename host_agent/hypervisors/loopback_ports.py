"""A VM's service ports on an address of this host that its guest reaches, and the settings that tell the guest.

VirtualBox's NAT cannot hand a guest's connection over as QEMU does (but on Windows): the service listens on a free port
of the loopback interface, and the guest finds it at the gateway. Only processes of this user are served (a VM of
another user could try the port as well); within one user, the guest's passcode and the tokens of copies keep VMs apart.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, gatherResults, succeed
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IAddress, IListeningPort, IProtocol, IProtocolFactory
from twisted.internet.task import deferLater
from twisted.logger import Logger
from zope.interface import implementer

LOOPBACK = "127.0.0.1"
SOCKETS = Path("/proc/net/tcp")
FREE = 0  # the port that stands for any that is free
TRIES, PAUSE = 40, 0.25  # seconds between two


class ServicePorts:
    """The service ports of one VM. `places` maps a port as the service names it to the real one."""

    def __init__(self, reactor: Any, services: Mapping[int, IProtocolFactory], address: str = LOOPBACK) -> None:
        self._reactor = reactor
        self._services = services
        self._address = address
        self._listening: list[IListeningPort] = []
        self.places: dict[int, int] = {}

    def open(self) -> None:
        """Listen on free ports."""
        for port, factory in self._services.items():
            self._opened(port, self._reactor.listenTCP(FREE, self._guarded(factory), interface=self._address))

    async def open_again(self, places: Mapping[int, int]) -> None:
        """Listen on the ports that a guest was told before."""
        for port, factory in self._services.items():
            guarded = self._guarded(factory)
            self._opened(port, await listen_again(self._reactor, places.get(port, FREE), guarded, self._address))

    def _guarded(self, factory: IProtocolFactory) -> IProtocolFactory:
        return OwnUserOnly(factory, checked=self._address == LOOPBACK)

    def _opened(self, port: int, listening: Any) -> None:
        self._listening.append(listening)
        self.places[port] = listening.getHost().port

    def close(self) -> Deferred[None]:
        listening, self._listening = self._listening, []
        closing = [port.stopListening() or succeed(None) for port in listening]
        return gatherResults(closing).addCallback(lambda _: None)


async def listen_again(reactor: Any, port: int, factory: IProtocolFactory, address: str = LOOPBACK) -> IListeningPort:
    """Listen where an earlier process of ours did; CannotListenError when that has been another program's for 10 s.

    Systems take the near end of any connection from the same range of ports: one of them may be there for a moment.
    """
    tries = TRIES
    while True:
        try:
            listening: IListeningPort = reactor.listenTCP(port, factory, interface=address)
            return listening
        except CannotListenError:
            if not tries:
                raise
        tries -= 1
        await deferLater(reactor, PAUSE)


def tell_guest(config: bytes, gateway: str, address: str, places: Mapping[int, int]) -> bytes:
    """A guest's settings with every port of `gateway` replaced by the real place.

    Settings that are not JSON, as tests have them, stay as they are.
    """
    try:
        value = json.loads(config)
    except ValueError:
        return config
    return json.dumps(_told(value, gateway, address, places)).encode("utf-8")


def _told(value: Any, gateway: str, address: str, places: Mapping[int, int]) -> Any:
    if isinstance(value, dict):
        told = {key: _told(each, gateway, address, places) for key, each in value.items()}
        if value.get("host") == gateway and value.get("port") in places:  # as `GuestConfig` writes a broker
            told.update(host=address, port=places[value["port"]])
        return told
    if isinstance(value, list):
        return [_told(each, gateway, address, places) for each in value]
    if isinstance(value, str):
        for port, place in places.items():
            value = value.replace(f"//{gateway}:{port}", f"//{address}:{place}")
    return value


@implementer(IProtocolFactory)
class OwnUserOnly:
    """Passes connections of this user's processes on to a factory, and drops the others."""

    _log = Logger()

    def __init__(self, factory: IProtocolFactory, *, checked: bool = True) -> None:
        self._factory = factory
        self._checked = checked and sys.platform == "linux"

    def doStart(self) -> None:
        self._factory.doStart()

    def doStop(self) -> None:
        self._factory.doStop()

    def buildProtocol(self, addr: IAddress) -> IProtocol | None:
        if self._checked:
            owner = owner_of(int(getattr(addr, "port", 0)), SOCKETS.read_text("ascii"))
            if owner not in (None, os.getuid()):
                self._log.warn("a connection of another user (id {uid}) to a VM's port is refused", uid=owner)
                return None
        return self._factory.buildProtocol(addr)


def owner_of(port: int, table: str) -> int | None:
    """User id of the process that has this local port of 127.0.0.1, from Linux's table of sockets."""
    address = struct.unpack("=I", socket.inet_aton(LOOPBACK))[0]  # the table prints it as the processor has it
    here = f"{address:08X}:{port:04X}"
    for line in table.splitlines()[1:]:
        words = line.split()
        if len(words) > 7 and words[1] == here:
            return int(words[7])
    return None
