"""The control client against a small scripted server: what it sends, dispatches and survives."""

from __future__ import annotations

import contextlib
import fcntl
import json
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from host_agent.control_client import MAX_LINE, ControlClient, ControlError, Endpoint, parse_endpoint, read_endpoint

Script = Callable[[socket.socket], None]


def line(**message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


class Server:
    """Says hello, then gives the connection to a script in a thread."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "s")
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(self.path)
        self.socket.listen()
        self.requests: list[dict[str, Any]] = []
        self.threads: list[threading.Thread] = []

    def connect(self, script: Script) -> ControlClient:
        thread = threading.Thread(target=self._serve, args=(script,), daemon=True)
        thread.start()
        self.threads.append(thread)
        return ControlClient.connect(Endpoint("h-1", 1, socket=self.path))

    def read(self, sock: socket.socket) -> dict[str, Any]:
        data = b""
        while not data.endswith(b"\n"):
            data += sock.recv(1 << 20)
        request: dict[str, Any] = json.loads(data)
        self.requests.append(request)
        return request

    def _serve(self, script: Script) -> None:
        sock, _ = self.socket.accept()
        with sock:
            hello = self.read(sock)
            sock.sendall(line(id=hello["id"], done={"agent": "h-1", "version": "0", "pid": 1}))
            script(sock)

    def close(self) -> None:
        for thread in self.threads:
            thread.join(10)
        self.socket.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.close()


def test_an_answer_can_be_waited_for_as_long_as_a_job_may_take(server: Server) -> None:
    def script(sock: socket.socket) -> None:
        request = server.read(sock)
        sock.sendall(line(id=request["id"], done={"outcome": "exited"}))
        sock.recv(1)

    client = server.connect(script)
    assert client.call("run", deadline_s=10 * 365 * 86400.0) == {"outcome": "exited"}  # as `vmctl run`
    client.close()


def test_updates_then_done(server: Server) -> None:
    def script(sock: socket.socket) -> None:
        request = server.read(sock)
        data = line(id=request["id"], update="fraction", data={"fraction": 0.5}) + line(id=99, done={})
        sock.sendall(data[:20])
        sock.sendall(data[20:] + line(id=request["id"], done={"outcome": "exited"}))
        sock.recv(1)

    client = server.connect(script)
    updates: list[tuple[str, dict[str, Any]]] = []
    result = client.call("run", {"vm": "V"}, lambda name, data: updates.append((name, data)))
    assert result == {"outcome": "exited"}
    assert updates == [("fraction", {"fraction": 0.5})]
    assert [request["call"] for request in server.requests] == ["hello", "run"]
    assert server.requests[1]["args"] == {"vm": "V"}
    assert client.fileno() >= 0
    client.close()
    assert client.fileno() == -1


def test_requests_overlap(server: Server) -> None:
    def script(sock: socket.socket) -> None:
        first, second = server.read(sock), server.read(sock)
        sock.sendall(line(id=second["id"], done={"n": 2}) + line(id=first["id"], done={"n": 1}))

    client = server.connect(script)
    ends: list[Any] = []
    client.start("run", on_end=lambda result, error: ends.append((result, error)))
    while len(server.requests) < 2:
        client.receive()
    assert client.call("vms") == {"n": 2}
    while len(ends) < 1:
        client.receive()
    assert ends == [({"n": 1}, None)]
    client.close()


def test_errors_and_a_lost_connection(server: Server) -> None:
    def script(sock: socket.socket) -> None:
        request = server.read(sock)
        sock.sendall(
            line(id=request["id"], error={"code": "no_vm", "message": "No VM is named X.", "hint": "vmctl vms"})
        )
        server.read(sock)

    client = server.connect(script)
    with pytest.raises(ControlError) as caught:
        client.call("ping", {"vm": "X"})
    assert (caught.value.code, str(caught.value), caught.value.hint) == ("no_vm", "No VM is named X.", "vmctl vms")
    with pytest.raises(ControlError, match="closed the connection"):
        client.call("ping")
    assert client.closed is not None
    with pytest.raises(ControlError) as caught:
        client.call("ping")
    assert caught.value.code == "closed"
    client.close()


def test_a_deadline(server: Server) -> None:
    def script(sock: socket.socket) -> None:
        server.read(sock)
        sock.recv(1)

    client = server.connect(script)
    with pytest.raises(ControlError, match=r"did not answer 'ping' in 0\.05 s"):
        client.call("ping", deadline_s=0.05)
    client.close()


@pytest.mark.parametrize("answer", [b"rubbish\n", b"[]\n", b'{"id": "x", "done": {}}\n', b"x" * (MAX_LINE + 2)])
def test_rubbish_ends_the_connection(server: Server, answer: bytes) -> None:
    def script(sock: socket.socket) -> None:
        server.read(sock)
        with contextlib.suppress(OSError):
            sock.sendall(answer)
            sock.recv(1)

    client = server.connect(script)
    with pytest.raises(ControlError) as caught:
        client.call("vms")
    assert caught.value.code == "bad_answer"
    assert client.fileno() == -1


def test_a_request_that_is_too_long(server: Server) -> None:
    def script(sock: socket.socket) -> None:
        sock.recv(1)

    client = server.connect(script)
    with pytest.raises(ControlError, match="longer than"):
        client.start("run", {"argv": ["x" * MAX_LINE]})
    client.close()


def test_endpoints(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_text(
        '{"agent": "h", "pid": 3, "version": "1", "address": ["127.0.0.1", 5], "token": "t", "ready": true}'
    )
    assert read_endpoint(path) == Endpoint("h", 3, "1", address=("127.0.0.1", 5), token="t")
    assert "token" not in repr(read_endpoint(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_endpoint(tmp_path / "none")
    for text in (
        "",
        "[]",
        '{"agent": "h"}',
        '{"agent": "h", "pid": 1}',
        '{"agent":"h","pid":1,"address":["10.0.0.1",1],"token":"t"}',
    ):
        with pytest.raises(ConfigError):
            parse_endpoint(text)
    with pytest.raises(ControlError, match="does not answer"):
        ControlClient.connect(Endpoint("h", 1, socket=str(tmp_path / "none")))


def test_a_descriptor_that_select_does_not_look_at(server: Server) -> None:
    def script(sock: socket.socket) -> None:
        request = server.read(sock)
        sock.sendall(line(id=request["id"], done={"ok": True}))

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    try:
        low = server.connect(script)
        client = ControlClient(socket.socket(fileno=fcntl.fcntl(low.fileno(), fcntl.F_DUPFD_CLOEXEC, 1100)))
        assert client.fileno() >= 1100
        assert client.call("vms") == {"ok": True}
        client.close()
        low.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
