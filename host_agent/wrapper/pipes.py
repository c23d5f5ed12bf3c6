"""The output of a child as something that the loop can wait for: on Windows only sockets can be waited for together."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import IO

_MOST = 4096


class WatchedPipe:
    """Has `fileno()` for a selector. On Windows a thread carries the bytes from the pipe to a socket."""

    def __init__(self, pipe: IO[bytes], through_socket: bool = os.name == "nt") -> None:
        self._pipe = pipe
        self._socket: socket.socket | None = None
        if through_socket:
            self._socket, there = socket.socketpair()
            threading.Thread(target=_carry, args=(pipe, there), name="child's output", daemon=True).start()

    def fileno(self) -> int:
        return self._pipe.fileno() if self._socket is None else self._socket.fileno()

    def read(self) -> bytes:
        """What is there; nothing at the end. Call it when it can be read."""
        if self._socket is None:
            return os.read(self._pipe.fileno(), _MOST)
        return self._socket.recv(_MOST)

    def close(self) -> None:
        """The pipe too, unless the thread is in it: it has ended when the child has."""
        if self._socket is None:
            self._pipe.close()
        else:
            self._socket.close()


def _carry(pipe: IO[bytes], there: socket.socket) -> None:
    with pipe, there, contextlib.suppress(OSError):
        while data := os.read(pipe.fileno(), _MOST):
            there.sendall(data)
