"""A QEMU process on Windows: a child of the host agent in a job object of its own, with which it ends.

It has the face of `QemuProcess`; there is no leash, so no other host agent ever takes it over.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from twisted.internet.defer import Deferred, fail, succeed

from common.windows_job import Job, ended_times, start_in

from .base import HypervisorError
from .leash import CONSOLE, ERROR_BYTES, PERIOD, Console
from .qemu_process import HowItEnded

IDLE_PRIORITY = 0x40
_BLOCK = 65536


class QemuChild:
    """One QEMU. `on_end` is called once, in the reactor's thread, when it has ended."""

    def __init__(self, reactor: Any, place: Path, on_end: Callable[[HowItEnded], None]) -> None:
        self._reactor = reactor
        self._on_end: Callable[[HowItEnded], None] | None = on_end
        self._job: Job | None = None
        self._errors = b""
        self._share = 1.0
        self._stands = False  # until its turn comes
        self._turn: Any = None
        self.pid: int | None = None
        self.leash_pid: int | None = None

    def start(self, argv: list[str], directory: Path, grace: float) -> Deferred[None]:
        """Fires when QEMU was started; `grace` has no meaning here."""
        try:
            job = self._job = Job()
            pipes = (subprocess.DEVNULL, subprocess.PIPE, subprocess.PIPE)
            process = start_in(job, argv, cwd=str(directory), environment=None, files=pipes, flags=IDLE_PRIORITY)
        except OSError as error:
            return fail(HypervisorError(f"QEMU cannot be started: {argv[0]}: {error.strerror}"))
        self.pid = process.pid
        threading.Thread(target=self._follow, args=(process, directory), name="QEMU", daemon=True).start()
        return succeed(None)

    def _follow(self, process: subprocess.Popen[bytes], directory: Path) -> None:
        """In a thread of its own: what it says, and its end."""
        assert process.stdout is not None
        assert process.stderr is not None
        errors = threading.Thread(target=self._read_errors, args=(process.stderr,), daemon=True)
        errors.start()
        console = Console(str(directory / CONSOLE))
        with process.stdout as output:
            while data := os.read(output.fileno(), _BLOCK):
                console.write(data)
        console.close()
        errors.join()
        status = process.wait()
        words = self._errors.decode("utf-8", "replace")
        how = HowItEnded(status, 0, words, sum(ended_times(process)))
        self._reactor.callFromThread(self._end, how)

    def _read_errors(self, pipe: IO[bytes]) -> None:
        with pipe:
            while data := os.read(pipe.fileno(), _BLOCK):
                self._errors = (self._errors + data)[-ERROR_BYTES:]

    def _end(self, how: HowItEnded) -> None:
        self.pid = None
        self.share(1.0)
        if self._job is not None:
            self._job.close()
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end(how)

    def reattach(self) -> Deferred[bool]:
        """Nothing outlives a host agent here."""
        return succeed(False)

    def terminate(self) -> None:
        """There is no way to ask it but its monitor."""
        self.kill()

    def kill(self) -> None:
        if self._job is not None and self.pid is not None:
            self._job.terminate()

    def share(self, share: float) -> None:
        """Of the time, that QEMU may run; 1 is no limit."""
        self._share = share
        if self._turn is not None and self._turn.active():
            self._turn.cancel()
        self._turn = None
        self._take_turn(stand=False)

    def _take_turn(self, stand: bool) -> None:
        if self._job is None:
            return
        if stand != self._stands:
            self._stands = stand
            self._job.suspend() if stand else self._job.resume()
        if self._share < 1.0 and self.pid is not None:
            length = PERIOD * (1.0 - self._share if stand else self._share)
            self._turn = self._reactor.callLater(length, self._take_turn, not stand)

    def let_go(self) -> None:
        """Its host agent ends, and it with it."""
        self._on_end = None
