"""Ports at which a guest looks for its host again: another program may be there for a moment."""

from __future__ import annotations

import socket
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import Factory
from twisted.internet.task import Clock

from host_agent.hypervisors.loopback_ports import LOOPBACK, PAUSE, TRIES, listen_again


class Listener(Clock):
    """A clock that can listen."""

    def listenTCP(self, port: int, factory: Any, interface: str) -> IListeningPort:
        from twisted.internet import reactor

        listening: IListeningPort = reactor.listenTCP(port, factory, interface=interface)
        return listening


def passing_connection() -> tuple[socket.socket, socket.socket, int]:
    """Its two ends, and the port that the system took for the near one."""
    with socket.create_server((LOOPBACK, 0)) as server:
        near = socket.create_connection(server.getsockname())
        return near, server.accept()[0], near.getsockname()[1]


def test_a_passing_connection_is_waited_for() -> None:
    near, far, port = passing_connection()
    reactor = Listener()
    found: list[Any] = []
    Deferred.fromCoroutine(listen_again(reactor, port, Factory())).addCallback(found.append)
    reactor.advance(PAUSE)
    assert not found
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # nothing of it stays
    far.close()
    near.close()
    reactor.advance(PAUSE)
    (listening,) = found
    assert listening.getHost().port == port
    listening.stopListening()


def test_a_program_that_stays_is_told() -> None:
    with socket.create_server((LOOPBACK, 0)) as server:
        reactor = Listener()
        listening = Deferred.fromCoroutine(listen_again(reactor, server.getsockname()[1], Factory()))
        failed: list[Any] = []
        listening.addErrback(failed.append)
        reactor.pump([PAUSE] * (TRIES - 1))
        assert not failed
        reactor.advance(PAUSE)
    assert failed[0].check(CannotListenError)
