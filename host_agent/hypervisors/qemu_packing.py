"""zstd between QEMU and the file of a state.

A guest that stands still while its memory is written waits for zstd no longer than it must: where this host has room,
QEMU writes into memory, which zstd packs when the guest runs again. It is no file, and so neither a page of it goes to
the disk nor does the kernel make QEMU wait for one that is slow.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from .helper_process import HelperProcess, exit_status
from .host_memory import spare_mb

ZSTD = "zstd"
SPARE_MB = 512  # that are left for everybody else while a state is in memory


class Compressor(HelperProcess):
    """One zstd. `ended` fires with "" or why it failed."""

    def __init__(self) -> None:
        self.ended: Deferred[str] = Deferred()

    @classmethod
    def into(cls, reactor: Any, zstd: str, path: Path, source: int) -> Compressor:
        """Compress what comes from a descriptor, which the caller closes, into a new file."""
        with path.open("xb") as file:
            return cls._between(reactor, [zstd, "-1", "-q", "-c"], source, file.fileno())

    @classmethod
    def out_of(cls, reactor: Any, zstd: str, path: Path) -> tuple[Compressor, int]:
        """Unpack a file, which zstd checks by its checksum; also returns the pipe's end for QEMU."""
        other, own = os.pipe()
        try:
            with path.open("rb") as file:
                return cls._between(reactor, [zstd, "-d", "-q", "-c"], file.fileno(), own), other
        finally:
            os.close(own)

    @classmethod
    def _between(cls, reactor: Any, command: list[str], source: int, target: int) -> Compressor:
        made = cls()
        reactor.spawnProcess(made, command[0], command, env=None, childFDs={0: source, 1: target, 2: "r"})
        return made

    def processEnded(self, reason: Failure) -> None:
        self.ended.callback("" if exit_status(reason) == 0 else (self.lines or [reason.getErrorMessage()])[-1])


class Packing:
    """A state on its way into its file. `descriptor` is for QEMU to write to, and open until `passed`."""

    def __init__(self, reactor: Any, zstd: str, path: Path, *, aside_mb: int = 0) -> None:
        """`aside_mb`: what QEMU will write is at most so large, and may wait in memory for `pack`."""
        self._begin = partial(Compressor.into, reactor, zstd, path)
        self._compressor: Compressor | None = None
        self._aside = -1
        if aside_mb and sys.platform == "linux" and spare_mb() >= aside_mb + SPARE_MB:
            self._aside = os.memfd_create("vmwrapper-state")
            self.descriptor = os.dup(self._aside)
            return
        source, self.descriptor = os.pipe()
        try:
            self._compressor = self._begin(source)
        except BaseException:
            self.passed()
            raise
        finally:
            os.close(source)

    def passed(self) -> None:
        """QEMU has a copy of the descriptor, or will never have one."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def pack(self) -> Compressor:
        """QEMU has written everything."""
        if self._compressor is None:
            os.lseek(self._aside, 0, os.SEEK_SET)
            self._compressor = self._begin(self._aside)
            self._forget()
        return self._compressor

    async def give_up(self) -> str:
        """It failed; zstd's own words if it was zstd that did."""
        self.passed()
        self._forget()
        if self._compressor is None:
            return ""
        if not self._compressor.ended.called:
            self._compressor.kill()
        words = await self._compressor.ended
        return words if words.startswith(ZSTD) else ""

    def _forget(self) -> None:
        aside, self._aside = self._aside, -1
        if aside >= 0:
            os.close(aside)
