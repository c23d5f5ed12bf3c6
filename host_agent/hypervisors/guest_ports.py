"""A VM's service ports: QEMU passes each of the guest's connections to us as a descriptor (`fd_passing.py`).

    guest ──TCP──▶ QEMU's user network ──socket pair──▶ fd_passing ──SCM_RIGHTS──▶ here ──▶ the service's protocol

Which VM a connection comes from is known by the socket it came through, whatever the guest says.
"""

from __future__ import annotations

import os
import shlex
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, gatherResults, succeed
from twisted.internet.interfaces import IFileDescriptorReceiver, IListeningPort, IProtocolFactory
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import Logger
from zope.interface import implementer

from host_agent.programs import lean_argv

HELPER = Path(__file__).with_name("fd_passing.py")


class GuestPorts:
    """The service ports of one VM, each a Unix socket in its private runtime directory."""

    def __init__(self, reactor: Any, directory: Path, services: Mapping[int, IProtocolFactory]) -> None:
        self._reactor = reactor
        self._directory = directory
        self._services = services
        self._listening: list[IListeningPort] = []

    def _path(self, port: int) -> Path:
        return self._directory / f"{port}.sock"

    def open(self) -> None:
        """Listen; before QEMU is started."""
        for port, factory in self._services.items():
            self._path(port).unlink(missing_ok=True)  # an agent that was killed left its own
            receiver = _ReceiverFactory(self._reactor, factory)
            mode = stat.S_IRUSR | stat.S_IWUSR
            self._listening.append(self._reactor.listenUNIX(str(self._path(port)), receiver, mode=mode))

    def forwards(self, gateway: str) -> str:
        """QEMU's `guestfwd` options for all ports."""
        options = []
        for port in self._services:
            # The library splits this like a shell would, without running one; QEMU doubles commas.
            command = shlex.join([*lean_argv(HELPER, "host_agent.hypervisors.fd_passing"), str(self._path(port))])
            options.append(f"guestfwd=tcp:{gateway}:{port}-cmd:{command}".replace(",", ",,"))
        return ",".join(options)

    def close(self) -> Deferred[None]:
        listening, self._listening = self._listening, []
        closing = [port.stopListening() or succeed(None) for port in listening]
        return gatherResults(closing).addCallback(lambda _: None)


class _ReceiverFactory(Factory):
    noisy = False

    def __init__(self, reactor: Any, service: IProtocolFactory) -> None:
        self._reactor = reactor
        self._service = service

    def buildProtocol(self, addr: object) -> _Receiver:
        return _Receiver(self._reactor, self._service)


@implementer(IFileDescriptorReceiver)
class _Receiver(Protocol):
    """Takes one descriptor and makes it a connection of the service."""

    _log = Logger()

    def __init__(self, reactor: Any, service: IProtocolFactory) -> None:
        self._reactor = reactor
        self._service = service

    def fileDescriptorReceived(self, descriptor: int) -> None:
        try:
            family = _family(descriptor)
            self._reactor.adoptStreamConnection(descriptor, family, self._service)
        except OSError as error:
            self._log.warn("a guest's connection could not be taken: {error}", error=error)
        finally:
            os.close(descriptor)  # the reactor has a copy of its own
            assert self.transport is not None
            self.transport.loseConnection()


def _family(descriptor: int) -> int:
    """Address family of a stream socket; sets what a conversation of small messages needs."""
    with socket.socket(fileno=os.dup(descriptor)) as copy:
        if copy.family in (socket.AF_INET, socket.AF_INET6):
            copy.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return copy.family
