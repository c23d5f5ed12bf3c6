"""The control interface of a host agent (`docs/control.md`): one JSON object a line, over a private socket."""

from __future__ import annotations

import base64
import json
import os
import secrets
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
from twisted.internet.abstract import FileDescriptor
from twisted.internet.defer import Deferred, maybeDeferred, succeed
from twisted.internet.interfaces import IListeningPort, IPushProducer
from twisted.internet.protocol import Factory, connectionDone
from twisted.logger import Logger
from twisted.protocols.basic import LineOnlyReceiver
from twisted.python.failure import Failure
from zope.interface import implementer

from common.errors import ConfigError, ProtocolError, TransferError, VMwrapperError
from common.files import endpoints_dir, write_private

from . import __version__
from .commands import Update
from .file_lock import ledger_lock
from .operations import Operations
from .virtual_machine import VMFailed

MAX_LINE = 1024 * 1024
MAX_REQUESTS = 256  # under way at once on one connection
MAX_BACKLOG = 16 * 1024 * 1024  # bytes that a client may leave unread

_to_json = json.JSONEncoder(separators=(",", ":")).encode

_CODES: list[tuple[type[VMwrapperError], str]] = [
    (VMFailed, "vm_failed"),
    (TransferError, "copy_failed"),
    (ProtocolError, "bad_request"),
    (ConfigError, "bad_request"),
]


@attrs.frozen
class Endpoint:
    """Where a host agent listens, as its endpoint file and its first line of output say it."""

    agent: str
    file: Path
    socket: Path | None
    address: tuple[str, int] | None
    token: str = attrs.field(repr=False)

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {"agent": self.agent, "pid": os.getpid(), "version": __version__}
        if self.socket is not None:
            value["socket"] = str(self.socket)
        elif self.address is not None:
            value.update(address=list(self.address), token=self.token)
        return value


class ControlServer:
    """Listens for clients and hands their calls to `operations`."""

    def __init__(self, reactor: Any, agent: str, operations: Operations) -> None:
        self._reactor = reactor
        self._agent = agent
        self.operations = operations
        self.token = ""
        self._port: IListeningPort | None = None
        self.endpoint: Endpoint | None = None

    def listen(self) -> Endpoint:
        """Open the socket and write the endpoint file."""
        with ledger_lock():  # no sweep is to take them for those of an agent of the same id that was killed
            return self._listen()

    def _listen(self) -> Endpoint:
        directory = endpoints_dir()
        file = directory / f"{self._agent}.json"
        factory = _ControlFactory(self)
        if hasattr(socket, "AF_UNIX"):
            path = directory / f"{self._agent}.sock"
            path.unlink(missing_ok=True)  # of an agent that was killed: its id, and with it the path, is ours alone
            self._port = self._reactor.listenUNIX(str(path), factory, mode=stat.S_IRUSR | stat.S_IWUSR)
            self.endpoint = Endpoint(self._agent, file, path, None, "")
        else:
            self.token = secrets.token_urlsafe(32)
            self._port = self._reactor.listenTCP(0, factory, interface="127.0.0.1")
            host: Any = self._port.getHost()
            self.endpoint = Endpoint(self._agent, file, None, ("127.0.0.1", host.port), self.token)
        write_private(file, json.dumps(self.endpoint.to_json()).encode("utf-8"))
        return self.endpoint

    def stop(self) -> Deferred[None]:
        """Listen no more and remove what `listen` made."""
        if self.endpoint is not None:
            self.endpoint.file.unlink(missing_ok=True)
        return succeed(None) if self._port is None else self._port.stopListening() or succeed(None)

    @property
    def hello(self) -> dict[str, Any]:
        return {"agent": self._agent, "version": __version__, "pid": os.getpid()}


def _no_update(name: str, data: dict[str, Any]) -> None:
    """For one who would not look at it: each is a line to write, and wakes two processes."""


class _ControlFactory(Factory):
    noisy = False

    def __init__(self, server: ControlServer) -> None:
        self.server = server

    def buildProtocol(self, addr: object) -> _Connection:
        return _Connection(self.server)


@implementer(IPushProducer)
class _Connection(LineOnlyReceiver):
    """One client. The transport pauses us while the client does not read; what then piles up has a bound."""

    delimiter = b"\n"
    MAX_LENGTH = MAX_LINE
    _log = Logger()

    def __init__(self, server: ControlServer) -> None:
        self._server = server
        self._greeted = False
        self._open = True
        self._under_way: set[int] = set()
        self._unread: int | None = None  # bytes written since the client stopped reading; None while it reads

    def connectionMade(self) -> None:
        transport: Any = self.transport
        transport.registerProducer(self, True)

    def pauseProducing(self) -> None:
        self._unread = 0

    def resumeProducing(self) -> None:
        self._unread = None

    def stopProducing(self) -> None:
        self._open = False

    def lineReceived(self, line: bytes) -> None:
        try:
            request = json.loads(line)
            number, call, args = request["id"], request["call"], request.get("args", {})
            if not (isinstance(number, int) and isinstance(call, str) and isinstance(args, dict)):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            self._drop("a line that is not a request")
            return
        if number in self._under_way or len(self._under_way) >= MAX_REQUESTS:
            self._drop("too many requests, or an id used twice")
            return
        self._under_way.add(number)
        if call == "hello":
            self._hello(number, args)
        elif not self._greeted:
            self._drop("a request before hello")
        else:
            self._call(number, call, args, _no_update if request.get("quiet") is True else self._updates(number))

    def lineLengthExceeded(self, line: bytes) -> None:
        self._drop(f"a line of more than {MAX_LINE} bytes")

    def _drop(self, why: str) -> None:
        self._log.warn("closed a control connection: {why}", why=why)
        self._open = False
        transport: Any = self.transport
        transport.abortConnection()

    def _hello(self, number: int, args: dict[str, Any]) -> None:
        if not secrets.compare_digest(str(args.get("token", "")).encode(), self._server.token.encode()):
            self._drop("a wrong token")
            return
        self._greeted = True
        self._end(number, {"done": self._server.hello})

    def _updates(self, number: int) -> Update:
        def update(name: str, data: dict[str, Any]) -> None:
            if "bytes" in data and isinstance(data["bytes"], bytes):
                data = {**data, "data": base64.b64encode(data["bytes"]).decode("ascii")}
                del data["bytes"]
            self._send({"id": number, "update": name, "data": data})

        return update

    def _call(self, number: int, call: str, args: dict[str, Any], update: Update) -> None:
        handler: Callable[..., Any] | None = self._server.operations.handler(call)
        if handler is None:
            self._end(number, {"error": {"code": "bad_request", "message": f"there is no call {call!r}", "hint": ""}})
            return
        answer = maybeDeferred(handler, args, update)
        answer.addCallbacks(
            lambda done: self._end(number, {"done": done or {}}), lambda failure: self._failed(number, call, failure)
        )

    def _failed(self, number: int, call: str, failure: Failure) -> None:
        error = failure.value
        if isinstance(error, VMwrapperError):
            code = getattr(error, "code", "") or next((c for kind, c in _CODES if isinstance(error, kind)), "refused")
            self._end(number, {"error": {"code": code, "message": str(error), "hint": error.hint}})
            return
        self._log.failure("the call {call} failed", failure, call=call)
        self._end(
            number,
            {"error": {"code": "internal", "message": f"{call} failed: {error!r}", "hint": "see the agent's log"}},
        )

    def _end(self, number: int, answer: dict[str, Any]) -> None:
        self._under_way.discard(number)
        self._send({"id": number, **answer})

    def _send(self, value: dict[str, Any]) -> None:
        if not self._open or self.transport is None:
            return
        line = _to_json(value).encode("ascii") + b"\n"
        transport: Any = self.transport
        transport.write(line)
        if isinstance(transport, FileDescriptor):
            transport.doWrite()  # what the socket takes now needs no turn of the reactor's
        if self._unread is not None:
            self._unread += len(line)
            if self._unread > MAX_BACKLOG:
                self._drop(f"its client left more than {MAX_BACKLOG} bytes unread")

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._open = False
