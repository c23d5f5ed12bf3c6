"""A guest's memory and devices on their way out of QEMU or into it, followed by QEMU's own events."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from twisted.internet.defer import Deferred

from .base import HypervisorError
from .qemu_packing import Packing
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

    async def write(self, qmp: QMP, packing: Packing, noted: Callable[[], None]) -> None:
        """All of it, while the guest stands still. `noted` is called meanwhile; an error of its own ends it."""
        await self._begin(qmp, packing, live=False)
        _noted(noted)
        await self._reaches(qmp, "completed", STATE_DEADLINE)

    async def write_live(
        self, qmp: QMP, packing: Packing, paused: Callable[[], Awaitable[None]], noted: Callable[[], None]
    ) -> None:
        """While the guest goes on. When little is left QEMU stops it: `paused`, `noted`, and the rest is written."""
        await self._begin(qmp, packing, live=True)
        await self._reaches(qmp, "pre-switchover", STATE_DEADLINE)
        await paused()
        _noted(noted)
        await qmp.execute("migrate-continue", state="pre-switchover")
        await self._reaches(qmp, "completed", PAUSED_DEADLINE)

    async def _begin(self, qmp: QMP, packing: Packing, *, live: bool) -> None:
        try:
            await self._send(qmp, packing.descriptor, {"x-ignore-shared": False, "pause-before-switchover": live})
        finally:
            packing.passed()

    async def _send(self, qmp: QMP, into: int, capabilities: dict[str, bool]) -> None:
        await _capabilities(qmp, {**capabilities, "events": True})
        await qmp.execute("migrate-set-parameters", **{"max-bandwidth": 10 << 30})  # the disk sets the pace
        await qmp.pass_descriptor("state", into)
        self._status = ""
        await qmp.execute("migrate", uri="fd:state")

    async def write_devices(self, qmp: QMP, into: int) -> None:
        """All but the memory, which is a shared file, of a guest that stands still."""
        await self._send(qmp, into, {"x-ignore-shared": True, "pause-before-switchover": False})
        await self._reaches(qmp, "completed", STATE_DEADLINE)

    async def read(self, qmp: QMP, source: int, *, has_memory: bool = False) -> None:
        """From a descriptor, whose other end must not wait for us to close ours."""
        await _capabilities(qmp, {"x-ignore-shared": has_memory, "events": True})
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


async def _capabilities(qmp: QMP, wanted: dict[str, bool]) -> None:
    each = [{"capability": name, "state": state} for name, state in wanted.items()]
    await qmp.execute("migrate-set-capabilities", capabilities=each)


def _noted(noted: Callable[[], None]) -> None:
    try:
        noted()
    except Exception as error:
        raise Refused(error) from None
