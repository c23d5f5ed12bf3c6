"""The disk image of one QEMU VM: an overlay of its own, with snapshots inside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from twisted.logger import Logger

from .base import HypervisorError
from .qemu_options import QEMU_IMG, program
from .qemu_states import run_tool
from .qmp import QMP

TOOL_DEADLINE = 120.0  # seconds for one run of qemu-img
DEVICE = "disk"  # QEMU's name for it


class Disk:
    """`qmp` is QEMU's monitor while one has the image open, and None when no QEMU runs."""

    _log = Logger()

    def __init__(self, reactor: Any, path: Path, owner: str) -> None:
        self.path = path
        self._reactor = reactor
        self._owner = owner

    async def make(self, base: Path) -> None:
        """An empty overlay over `base`, which is never written."""
        await self._tool("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(self.path))

    async def keep(self, qmp: QMP, tag: str) -> None:
        """A snapshot of this moment; the guest has to stand still."""
        await qmp.execute("blockdev-snapshot-internal-sync", device=DEVICE, name=tag)

    async def tags(self) -> list[str]:
        """Of its snapshots, while no QEMU has it open."""
        told = json.loads(await self._tool("info", "--output=json", "-U", str(self.path)))
        return [each["name"] for each in told.get("snapshots", [])]

    async def go_back(self, tag: str) -> None:
        """To one of its snapshots, while no QEMU has it open."""
        await self._tool("snapshot", "-q", "-a", tag, str(self.path))

    async def drop(self, qmp: QMP | None, tags: list[str]) -> None:
        """Remove snapshots; one that cannot be removed costs room and nothing else."""
        for tag in tags:
            try:
                if qmp is not None:
                    await qmp.execute("blockdev-snapshot-delete-internal-sync", device=DEVICE, name=tag)
                else:
                    await self._tool("snapshot", "-q", "-d", tag, str(self.path))
            except HypervisorError as error:
                if "not found" not in str(error) and "does not exist" not in str(error):
                    self._log.warn("{name}: {error}", name=self._owner, error=error)

    async def _tool(self, *arguments: str) -> str:
        what = f"the disk of {self._owner} cannot be used"
        return await run_tool(self._reactor, TOOL_DEADLINE, what, program(QEMU_IMG), *arguments)
