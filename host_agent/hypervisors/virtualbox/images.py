"""From a guest image to the disk that VirtualBox makes differences over."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

from twisted.internet.defer import DeferredLock
from twisted.internet.threads import deferToThread

from ..base import HypervisorError
from ..images import Image, image_store
from .calls import Calls

DISKS = (".vdi", ".vmdk", ".vhd")
CONVERT_DEADLINE = 900.0  # seconds; an image of some GB on a slow disk
BUILD = "an image with its own boot loader is needed, as vdi, vmdk or ova"


class BaseDisks:
    """Finds an image's disk; an OVA's is taken out and converted once, and kept beside the images."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._one = DeferredLock()

    async def disk_of(self, image: Image) -> Path:
        """The disk to make differences over, which is never written."""
        if image.kernel is not None:
            raise HypervisorError(f"VirtualBox cannot start the image {image.name}: it has no boot loader", BUILD)
        kind = image.disk.suffix.lower()
        if kind in DISKS:
            return image.disk
        if kind != ".ova":
            raise HypervisorError(f"VirtualBox cannot use the image {image.name}: {image.disk.name}", BUILD)
        await self._one.acquire()
        try:
            return await self._from_ova(image)
        finally:
            self._one.release()

    async def _from_ova(self, image: Image) -> Path:
        place = image_store() / ".virtualbox"
        target = place / f"{image.digest[:40]}.vdi"
        if target.is_file():
            return target
        place.mkdir(parents=True, exist_ok=True)
        work = place / f".making-{image.digest[:40]}-{os.getpid()}"
        work.mkdir(mode=0o700)
        try:
            taken: Any = deferToThread(_take_disk, image.disk, work)
            source = await taken
            made = work / "disk.vdi"
            await self._calls.call("convert", CONVERT_DEADLINE, source=str(source), target=str(made))
            made.replace(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return target


def _take_disk(ova: Path, directory: Path) -> Path:
    """The disk in an OVA, which is a tar archive with an .ovf and one or more disks."""
    try:
        with tarfile.open(ova) as archive:
            disks = [m for m in archive if m.isfile() and m.name.lower().endswith(DISKS)]
            if len(disks) != 1:
                raise HypervisorError(f"{ova} has {len(disks)} disks: one is needed", BUILD)
            source = archive.extractfile(disks[0])
            assert source is not None
            target = directory / f"ova{Path(disks[0].name).suffix.lower()}"
            with target.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            return target
    except (tarfile.TarError, OSError) as error:
        raise HypervisorError(f"the appliance {ova} cannot be read: {error}") from None
