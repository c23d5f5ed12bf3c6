"""TLS whose bytes the reactor reads and writes: what is told, and that its end is one."""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import pytest

from common import stomp_connection
from common.broker_address import Tls
from common.tls import TlsError, TlsSocket
from host_agent.broker.setup.certificates import make_authority, make_certificate


def test_goodbye_is_the_end(tmp_path: Path) -> None:
    """It reads as nothing, again and again: taken for data it would keep the reactor busy for ever."""
    make_authority(tmp_path)
    make_certificate(tmp_path, ["localhost"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    theirs.settimeout(20)

    def serve() -> None:
        with context.wrap_socket(theirs, server_side=True) as broker:
            assert broker.recv(100) == b"hello"
            broker.sendall(b"welcome")
            try:
                broker.unwrap()
            except OSError:
                pass  # we do not say goodbye

    serving = threading.Thread(target=serve, daemon=True)
    serving.start()
    tls = TlsSocket(ours, Tls(ca=(tmp_path / "ca.pem").read_text()), "localhost")
    ours.sendall(tls.encrypt(b"hello"))
    heard, ended = b"", False
    while not ended:
        plain, ended = tls.decrypt(ours.recv(65536))
        heard += plain
    assert heard == b"welcome"
    tls.close()
    serving.join(20)


class Python39Timeout(OSError):
    """`socket.timeout` as Python 3.9 has it: not a TimeoutError."""


def test_a_broker_that_is_silent_is_named_by_python_3_9_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_authority(tmp_path)
    monkeypatch.setattr(socket, "timeout", Python39Timeout)
    assert stomp_connection._why(Python39Timeout("timed out")) == "no answer within 20 s"
    assert stomp_connection._why(TimeoutError()) == "no answer within 20 s"

    class Silent:
        def recv(self, most: int) -> bytes:
            raise Python39Timeout("timed out")

        def sendall(self, data: bytes) -> None:
            pass

    network: Any = Silent()
    with pytest.raises(TlsError, match="did not answer in TLS in time"):
        TlsSocket(network, Tls(ca=(tmp_path / "ca.pem").read_text()), "localhost")
