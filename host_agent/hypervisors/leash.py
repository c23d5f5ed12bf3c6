"""The leash of one VM: parent of its QEMU, alive as long as QEMU is, whatever happens to the host agent.

The host agent's connection is the leash. When it is lost, because the agent ended or was killed, the VM goes on for
the grace time; an agent that connects in that time has it. When nobody comes, QEMU is killed and what it had on this
host is removed, except for states that can be restored.

A process of its own, run by path with `python -I -S` and the standard library alone: small, and nothing to wait for.
Settings come through standard input, each with a NUL at its end: place (of the sockets, in the ledger), directory (of
the VM), grace (seconds), and QEMU's command line. It answers by ending its first process once it can be connected to.

    agent ──▶ leash   {"signal": 15}, {"share": 0.5}, {"done": true}
    leash ──▶ agent   {"leash": pid, "process": pid}, {"ended": {"status", "signal", "errors", "cpu_seconds"}},
                      {"busy": true} to a second agent
"""

from __future__ import annotations

import _socket
import os
import sys

SOCKET = "leash.sock"
# SIGHUP, SIGINT, SIGPIPE, SIGTERM. Their names are in a module that takes half as long as Python's own start.
DEFAULTS = (1, 2, 13, 15)


class Begun:
    """What is done before anything else: every start of a VM waits for it."""

    def __init__(self) -> None:
        """In the leash's own process; the first one ends here."""
        words = sys.stdin.buffer.read().split(b"\0")[:-1]
        self.place, self.directory = os.fsdecode(words[0]), os.fsdecode(words[1])
        self.grace = float(words[2])
        os.umask(0o077)
        path = os.path.join(self.place, SOCKET)  # noqa: PTH118  (pathlib is 10 ms)
        if os.path.exists(path):  # noqa: PTH110
            os.unlink(path)  # noqa: PTH108
        self.listening = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        self.listening.bind(path)
        self.listening.listen(4)
        if os.fork():
            os._exit(0)  # whoever started us may connect now
        os.setsid()
        os.chdir(self.directory)
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        self.output, output_end = os.pipe()
        self.errors, errors_end = os.pipe()
        places = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, output_end, 1),
            (os.POSIX_SPAWN_DUP2, errors_end, 2),
        ]
        self.pid, self.why_not = 0, ""
        try:
            self.pid = os.posix_spawn(words[3], words[3:], os.environ, file_actions=places, setsigdef=DEFAULTS)
        except OSError as error:
            self.why_not = f"{os.fsdecode(words[3])}: {error.strerror}"
        os.close(output_end)
        os.close(errors_end)


# Here, because QEMU starts while the rest is loaded.
_BEGUN = Begun() if __name__ == "__main__" else None

import json  # noqa: E402
import selectors  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import time  # noqa: E402
from typing import Any  # noqa: E402

STATES = "states.json"  # in the VM's directory while there is something to restore
CONSOLE = "console.log"
CONSOLE_BYTES = 64 * 1024
ERROR_BYTES = 4000
LONGEST_LINE = 4096
PERIOD = 0.1  # seconds in which a share of the processor's time is given out
FIRST_WAIT = 10.0  # seconds for the agent that started us to connect


class Leash:
    """The parent of a QEMU that has begun."""

    def __init__(self, begun: Begun) -> None:
        self._pid = begun.pid
        self._place, self._directory, self._grace = begun.place, begun.directory, begun.grace
        self._listening = socket.socket(fileno=begun.listening.detach())
        self._agent: socket.socket | None = None
        self._words = b""
        self._done = False
        self._ended: dict[str, Any] | None = None
        self._errors = b""
        self._share = 1.0
        self._stands = False  # QEMU was stopped, until its turn comes
        self._turn = 0.0
        self._console = Console(os.path.join(self._directory, CONSOLE))  # noqa: PTH118  (pathlib is 10 ms)
        self._selector = selectors.DefaultSelector()
        self._selector.register(begun.output, selectors.EVENT_READ, self._output)
        self._selector.register(begun.errors, selectors.EVENT_READ, self._error)
        if begun.why_not:
            self._how_it_ended(127, 0, begun.why_not, 0.0)

    def run(self) -> None:
        wake, woken = os.pipe()
        os.set_blocking(woken, False)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # whoever means the VM tells the agent
        self._look()  # it may have ended before we could hear of it
        self._selector.register(wake, selectors.EVENT_READ, self._woken)
        self._selector.register(self._listening, selectors.EVENT_READ, self._connected)
        alone_until = time.monotonic() + max(self._grace, FIRST_WAIT)
        while not (self._done and self._ended is not None):
            if self._agent is None and alone_until <= time.monotonic():
                self._give_up()
                return
            had = self._agent
            for key, _ in self._selector.select(self._wait(alone_until)):
                key.data(key.fd)
            self._give_turns()
            if had is not None and self._agent is None:
                alone_until = time.monotonic() + self._grace

    def _wait(self, alone_until: float) -> float | None:
        """Seconds until something is due; None when only events count."""
        due = [] if self._agent is not None else [alone_until]
        if (self._share < 1.0 or self._stands) and self._ended is None:
            due.append(self._turn)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _give_turns(self) -> None:
        """Stop QEMU and let it go on, so that it runs for its share of the time."""
        now = time.monotonic()
        if self._ended is not None or (self._share >= 1.0 and not self._stands) or now < self._turn:
            return
        self._stands = not self._stands
        os.kill(self._pid, signal.SIGSTOP if self._stands else signal.SIGCONT)
        self._turn = now + PERIOD * (1.0 - self._share if self._stands else self._share)

    # -- what happens

    def _output(self, descriptor: int) -> None:
        if data := os.read(descriptor, 65536):
            self._console.write(data)
        else:
            self._selector.unregister(descriptor)

    def _error(self, descriptor: int) -> None:
        if data := os.read(descriptor, 65536):
            self._errors = (self._errors + data)[-ERROR_BYTES:]
        else:
            self._selector.unregister(descriptor)

    def _woken(self, descriptor: int) -> None:
        os.read(descriptor, 4096)
        self._look()

    def _look(self, wait: bool = False) -> None:
        """Has QEMU ended?"""
        if self._ended is not None:
            return
        pid, status, usage = os.wait4(self._pid, 0 if wait else os.WNOHANG)
        if pid == 0:
            return
        for key in list(self._selector.get_map().values()):  # its last words
            if key.data in (self._output, self._error):
                os.set_blocking(key.fd, False)
                try:
                    key.data(key.fd)
                except BlockingIOError:
                    pass
        code = os.waitstatus_to_exitcode(status)
        words = self._errors.decode("utf-8", "replace")
        self._how_it_ended(max(code, 0), max(-code, 0), words, usage.ru_utime + usage.ru_stime)

    def _how_it_ended(self, status: int, number: int, errors: str, cpu: float) -> None:
        self._ended = {"status": status, "signal": number, "errors": errors, "cpu_seconds": cpu}
        self._tell({"ended": self._ended})

    # -- the agent

    def _connected(self, _: int) -> None:
        try:
            other, _address = self._listening.accept()
        except OSError:
            return  # it went away at once
        other.settimeout(5)  # so that an agent that does not read cannot hold up the VM's parent for ever
        if self._agent is not None:
            _send(other, {"busy": True})
            other.close()
            return
        self._agent, self._words = other, b""
        self._selector.register(other, selectors.EVENT_READ, self._heard)
        self._tell({"leash": os.getpid(), "process": self._pid})
        if self._ended is not None:
            self._tell({"ended": self._ended})

    def _tell(self, message: dict[str, Any]) -> None:
        if self._agent is not None and not _send(self._agent, message):
            self._lost()

    def _lost(self) -> None:
        if self._agent is not None:
            self._selector.unregister(self._agent)
            self._agent.close()
            self._agent = None

    def _heard(self, _: int) -> None:
        assert self._agent is not None
        try:
            data = self._agent.recv(4096)
        except OSError:
            data = b""
        if not data or len(self._words) > LONGEST_LINE:
            self._lost()
            return
        *lines, self._words = (self._words + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "signal" in message and self._ended is None:
                os.kill(self._pid, message["signal"])
            if "share" in message:
                self._share, self._turn = min(1.0, max(0.05, message["share"])), 0.0
            self._done = self._done or "done" in message

    # -- nobody came

    def _give_up(self) -> None:
        if self._ended is None:
            os.kill(self._pid, signal.SIGKILL)
            self._look(wait=True)
        if not os.path.exists(os.path.join(self._directory, STATES)):  # noqa: PTH110, PTH118
            shutil.rmtree(self._directory, ignore_errors=True)
        shutil.rmtree(self._place, ignore_errors=True)


class Console:
    """The guest's console in a file of bounded size, however much the guest writes."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: PTH123, SIM115
        self._tail = b""

    def write(self, data: bytes) -> None:
        self._tail = (self._tail + data)[-CONSOLE_BYTES:]
        try:
            self._file.write(data)
            if self._file.tell() > 2 * CONSOLE_BYTES:
                new = open(f"{self._path}.new", "wb", buffering=0)  # noqa: PTH123, SIM115
                new.write(self._tail)
                os.replace(f"{self._path}.new", self._path)  # noqa: PTH105
                self._file.close()
                self._file = new
        except OSError:
            pass  # the disk is full, or the directory was removed: the VM is not to suffer from it

    def close(self) -> None:
        self._file.close()


def _send(to: socket.socket, message: dict[str, Any]) -> bool:
    try:
        to.sendall(json.dumps(message).encode() + b"\n")
        return True
    except OSError:
        return False


if _BEGUN is not None:
    Leash(_BEGUN).run()
