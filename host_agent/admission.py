"""Whether this host has room for one more VM now: memory, processors, and how many VMs start at the same moment.

All host agents of a user ask the same directory, `<runtime>/admission/`:

    lock            held for the moment in which somebody looks and takes
    start-<n>       held while a VM starts: as many at once as there are files
    <instance>      what a VM was promised (JSON): memory, processors, and whose it is

The kernel gives the locks back when their holder dies, and a promise counts only while its owner lives: nothing has to
be cleaned up for the next one to get in.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import psutil
from twisted.internet.task import deferLater

from common.errors import VMwrapperError
from common.files import runtime_dir, write_private

from .file_lock import try_lock
from .process_identity import identity_of, is_alive

SPARE_MB = 256  # that the volunteer's own programs keep, at least
AT_ONCE = 3  # VMs that start at the same moment; more on a host with many cores
PER_CORE = 2  # virtual processors: the client counts too, so this is a last resort
PATIENCE = 300.0  # seconds
LOOK_AGAIN = 0.5  # nobody rings a bell when there is room again


class NoRoom(VMwrapperError):
    """There is no room for a VM, and none came in time."""

    code = "no_room"  # as in `docs/control.md`


@attrs.frozen
class Host:
    """What a host has."""

    cores: int
    available_mb: Callable[[], int]

    @classmethod
    def this(cls) -> Host:
        return cls(os.cpu_count() or 1, lambda: psutil.virtual_memory().available >> 20)


@attrs.define(eq=False)
class Ticket:
    """A VM's place: to start, and to be."""

    _promise: Path
    _start: int  # descriptor of the lock; -1: it has started

    def started(self) -> None:
        """The next one may start."""
        if self._start >= 0:
            os.close(self._start)
            self._start = -1

    def close(self) -> None:
        """The VM is gone."""
        self.started()
        self._promise.unlink(missing_ok=True)


class Admission:
    """The way in. `place` is shared by all who count together."""

    def __init__(self, reactor: Any, host: Host | None = None, place: Path | None = None) -> None:
        self._reactor = reactor
        self._host = host or Host.this()
        self._chosen = place

    @property
    def _place(self) -> Path:
        place = self._chosen or runtime_dir() / "admission"
        place.mkdir(mode=0o700, exist_ok=True)
        return place

    async def enter(
        self,
        instance: str,
        memory_mb: int,
        cpus: int,
        tell: Callable[[str], None],
        wanted: Callable[[], bool] = lambda: True,
    ) -> Ticket:
        """Wait until there is room, at most PATIENCE; `tell` says once what for. Raises NoRoom.

        `wanted`: whether somebody waits for it still.

        A VM that is larger than the host is refused at once.
        """
        most = PER_CORE * self._host.cores
        if cpus > most:
            raise NoRoom(f"a VM with {cpus} processors does not fit: this computer has {self._host.cores}")
        until = self._reactor.seconds() + PATIENCE
        told = ""
        while True:
            ticket, why_not = self._try(instance, memory_mb, cpus)
            if ticket is not None:
                return ticket
            if self._reactor.seconds() >= until:
                raise NoRoom(f"{why_not}, for {PATIENCE:.0f} s", "close other programs, or let fewer jobs run at once")
            if not told:
                told = why_not
                tell(why_not)
            await deferLater(self._reactor, LOOK_AGAIN)
            if not wanted():
                raise NoRoom("it was stopped while it waited for its turn")

    def again(self, instance: str, memory_mb: int, cpus: int) -> Ticket:
        """The place of a VM that an earlier host agent left: it is there, whether there is room or not."""
        return Ticket(self._promise(instance, memory_mb, cpus), -1)

    def _promise(self, instance: str, memory_mb: int, cpus: int) -> Path:
        path = self._place / f"{instance}.json"
        value = {"owner": identity_of(os.getpid()), "memory_mb": memory_mb, "cpus": cpus}
        write_private(path, json.dumps(value).encode("ascii"))
        return path

    def _try(self, instance: str, memory_mb: int, cpus: int) -> tuple[Ticket | None, str]:
        """A ticket, or why there is none now."""
        lock = try_lock(self._place / "lock")
        if lock is None:
            return None, "another VM is being let in"
        try:
            promised_cpus = sum(promise["cpus"] for promise in self._promises())
            if promised_cpus + cpus > PER_CORE * self._host.cores:
                return None, f"the VMs on this computer have {promised_cpus} processors already"
            free = self._host.available_mb() - self._outstanding_mb()
            if memory_mb and free < memory_mb + SPARE_MB:
                return (
                    None,
                    f"this computer has {max(0, free)} MB of memory free, and a VM needs {memory_mb + SPARE_MB} MB",
                )
            start = self._start()
            if start is None:
                return None, "other VMs are starting"
            try:
                return Ticket(self._promise(instance, memory_mb, cpus), start), ""
            except BaseException:
                os.close(start)
                raise
        finally:
            os.close(lock)

    def _start(self) -> int | None:
        for number in range(max(AT_ONCE, self._host.cores // 2)):
            held = try_lock(self._place / f"start-{number}")
            if held is not None:
                return held
        return None

    def _promises(self) -> Iterator[dict[str, Any]]:
        """Of all VMs whose owner lives; those of dead ones are removed."""
        for path in self._place.glob("*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                promise = json.loads(path.read_bytes())
                if is_alive(promise["owner"]):
                    yield {**promise, "instance": path.stem}
                else:
                    path.unlink(missing_ok=True)

    def _outstanding_mb(self) -> int:
        """Memory that was promised and is not used yet: the system still counts it as available."""
        return sum(max(0, promise["memory_mb"] - _used_mb(promise["instance"])) for promise in self._promises())


def _used_mb(instance: str) -> int:
    """What the process of a VM has of its memory already; 0 when it has none yet."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, psutil.Error):
        entry = json.loads((runtime_dir() / "vms" / instance / "entry.json").read_bytes())
        process = entry["process"]
        if process is not None and is_alive(process):
            return int(psutil.Process(process[0]).memory_info().rss) >> 20
    return 0
