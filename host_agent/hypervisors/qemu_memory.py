"""A guest's memory and devices on their way out of QEMU or into it, followed by QEMU's own events."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred

from .base import HypervisorError
from .qemu_states import Compressor
from .qmp import QMP

STATE_DEADLINE = 300.0  # seconds for all of a guest's memory, to the disk or from it
PAUSED_DEADLINE = 60.0  # for the part of it in which the guest stands still

_ENDS = ("completed", "failed", "cancelled")
_UNDER_WAY = ("setup", "active", "pre-switchover", "device")


class Refused(HypervisorError):
    """The caller's own error while the guest stood still."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Memory:
    """The memory of one VM; one transfer at a time."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._status = ""
        self._waiting: list[tuple[str, Deferred[str]]] = []

    async def write(self, qmp: QMP, zstd: str, path: Path, paused: Callable[[], Awaitable[None]]) -> Compressor:
        """Into a new file, through zstd, which may still be at work when this returns.

        `paused` is called when the guest stands still and little is left to be sent; an error of its own ends it.
        """
        wanted = [{"capability": name, "state": True} for name in ("pause-before-switchover", "events")]
        await qmp.execute("migrate-set-capabilities", capabilities=wanted)
        await qmp.execute("migrate-set-parameters", **{"max-bandwidth": 10 << 30})  # the disk sets the pace
        compressor, pipe = Compressor.into(self._reactor, zstd, path)
        try:
            try:
                await qmp.pass_descriptor("state", pipe)
            finally:
                os.close(pipe)
            self._status = ""
            await qmp.execute("migrate", uri="fd:state")
            await self._reaches(qmp, "pre-switchover", STATE_DEADLINE)
            await paused()
            await qmp.execute("migrate-continue", state="pre-switchover")
            await self._reaches(qmp, "completed", PAUSED_DEADLINE)
        except BaseException as error:
            compressor.kill() if not compressor.ended.called else None
            words = await compressor.ended if not isinstance(error, Refused) else ""
            if words and isinstance(error, HypervisorError) and words.startswith("zstd"):
                raise HypervisorError(words) from None
            raise
        return compressor

    async def read(self, qmp: QMP, source: int) -> None:
        """From a descriptor, whose other end must not wait for us to close ours."""
        wanted = [{"capability": "events", "state": True}]
        await qmp.execute("migrate-set-capabilities", capabilities=wanted)
        await qmp.pass_descriptor("state", source)
        self._status = ""
        await qmp.execute("migrate-incoming", uri="fd:state")
        await self._reaches(qmp, "completed", STATE_DEADLINE)

    async def cancel(self, qmp: QMP) -> bool:
        """End a transfer that somebody began; False when none is under way."""
        if (await qmp.execute("query-migrate")).get("status") not in _UNDER_WAY:
            return False
        ended = self._reached("cancelled").addTimeout(PAUSED_DEADLINE, self._reactor)
        await qmp.execute("migrate_cancel")
        if (await qmp.execute("query-migrate")).get("status") in _ENDS:
            self.now("cancelled")
        await ended
        return True

    def now(self, status: str) -> None:
        """QEMU says how far it is."""
        self._status = status
        waiting, self._waiting = self._waiting, []
        for wanted, waiter in waiting:
            if status == wanted or status in _ENDS:
                if not waiter.called:
                    waiter.callback(status)
            else:
                self._waiting.append((wanted, waiter))

    def end(self, failure: HypervisorError) -> None:
        """QEMU has ended: nothing comes any more."""
        waiting, self._waiting = self._waiting, []
        for _, waiter in waiting:
            if not waiter.called:
                waiter.errback(failure)

    async def _reaches(self, qmp: QMP, status: str, deadline: float) -> None:
        found = await self._reached(status).addTimeout(deadline, self._reactor)
        if found != status:
            told = await qmp.execute("query-migrate")
            raise HypervisorError(f"QEMU says: {told.get('error-desc', found)}")

    def _reached(self, wanted: str) -> Deferred[str]:
        """Fires with `wanted`, or with how it ended instead."""
        waiter: Deferred[str] = Deferred()
        if self._status == wanted or self._status in _ENDS:
            waiter.callback(self._status)
        else:
            self._waiting.append((wanted, waiter))
        return waiter
