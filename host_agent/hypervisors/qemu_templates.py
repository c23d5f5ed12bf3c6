"""Warm starts: a VM that was booted once, kept as memory and disk, from which others begin.

A template is taken when the guest's agent has loaded everything and waits for its settings, which only the clones get:
nothing in it is secret or one machine's own. It belongs to one image, hardware, QEMU and command line; when any of them
changes its key does, and it is not found any more. Templates lie beside the images, in `.templates/<key>/`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.threads import deferToThread
from twisted.logger import Logger

from common.files import write_private
from host_agent.ledger import LedgerEntry

from .base import HypervisorError, MachineSpec
from .images import Image
from .qemu_machine import TEMPLATE_DISK, Clone, QemuMachine
from .qemu_options import KVM, QEMU, QEMU_IMG, TCG, command_line, program
from .qemu_packing import ZSTD
from .qemu_states import States, run_tool, sync
from .qemu_vm import DISK
from .qemu_wiring import Wires

FORMAT = 2
FOLDER = ".templates"
MEMORY = "memory"  # of an emulated guest: clones map it, and share what they do not write
STATE = "state"  # what QEMU reads
OVERLAY = "overlay.qcow2"
BLOCK = 64 * 1024
RECORD = "template.json"
BOOT_DEADLINE = 180.0  # seconds until a guest waits for its settings
TOOL_DEADLINE = 120.0
UNUSED = 30 * 86400.0  # seconds after which a template that nobody started from is removed


class Templates:
    """The templates of this host's images."""

    _log = Logger()

    def __init__(self, reactor: Any, gave_up: Callable[[str], None] = lambda words: None) -> None:
        self._reactor = reactor
        self._gave_up = gave_up
        self._version = ""
        self._making: dict[str, list[Deferred[None]]] = {}

    async def clone_for(self, spec: MachineSpec, accelerator: tuple[str, ...]) -> Clone | None:
        """What a VM of this spec can start from, made now if need be; None when it has to boot, the reason logged."""
        if not spec.image.warm_start:
            return None
        try:
            key = await self._key(spec, accelerator)
            place = spec.image.beside / FOLDER / key
            if key in self._making:
                waiter: Deferred[None] = Deferred()
                self._making[key].append(waiter)
                await waiter
            elif not _whole(place):
                await self._make_once(spec, accelerator, key, place)
            if not _whole(place):
                raise HypervisorError("it could not be made")
            (place / RECORD).touch()  # it is in use
            memory = place / MEMORY if (place / MEMORY).exists() else None
            if memory is not None:
                deferToThread(_read_ahead, memory).addErrback(lambda _: None)
            return Clone(place / TEMPLATE_DISK, place / OVERLAY, place / STATE, memory)
        except (HypervisorError, OSError, defer.TimeoutError) as error:
            self._log.warn("{name} boots, there is no template for it: {error}", name=spec.name, error=error)
            return None

    async def _key(self, spec: MachineSpec, accelerator: tuple[str, ...]) -> str:
        qemu = program(QEMU)
        if not self._version:
            said = await run_tool(self._reactor, TOOL_DEADLINE, "QEMU does not say its version", qemu, "--version")
            self._version = f"{said.splitlines()[0]} {Path(qemu).stat().st_mtime_ns}"
        nobody = attrs.evolve(spec, name="template", directory=Path("/"))
        argv = command_line(nobody, accelerator, Path("disk"), Wires("", "", ""), None)
        parts = [FORMAT, spec.image.digest, self._version, argv, sorted(spec.services)]
        if accelerator is KVM:
            parts.append(Path("/proc/cpuinfo").read_text("utf-8").partition("\n\n")[0].partition("cpu MHz")[0])
        return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()[:32]

    async def _make_once(self, spec: MachineSpec, accelerator: tuple[str, ...], key: str, place: Path) -> None:
        place.parent.mkdir(mode=0o700, exist_ok=True)
        self._making[key] = []
        try:
            with _locked(place.parent / f"{key}.lock") as mine:
                if not mine:
                    raise HypervisorError("another process makes it at this moment")
                began = time.monotonic()
                await self._make(spec, accelerator, key, place)
                self._log.info(
                    "made a template of {image} in {s:.1f} s", image=spec.image.name, s=time.monotonic() - began
                )
                self._remove_unused(spec.image)
        finally:
            for waiter in self._making.pop(key):
                waiter.callback(None)

    async def _make(self, spec: MachineSpec, accelerator: tuple[str, ...], key: str, place: Path) -> None:
        number = f"{key[:12]}-{os.getpid()}"
        work = place.parent / f"vm-{number}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(mode=0o700)
        nobody = Factory.forProtocol(_HangUp)
        own = attrs.evolve(
            spec,
            name="template",
            instance=f"t-{number}",
            directory=work,
            guest_config=b"",
            services=dict.fromkeys(spec.services, nobody),
            on_state=lambda state, reason: None,
        )
        machine = QemuMachine(self._reactor, own, LedgerEntry(own.instance, work), States(work), grace=0.0)
        machine.accelerator, machine.gave_up = accelerator, self._gave_up
        new = place.with_name(f"{key}.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        try:
            await machine.make_disk(spec.image.disk)
            # Memory that is a file has small pages only: what is not emulated computes with larger ones.
            if accelerator is TCG:
                await machine.start_as_template(BOOT_DEADLINE, work / MEMORY)
                await machine.end_as_template(new / STATE)
                await deferToThread(_without_nothing, work / MEMORY, new / MEMORY)
            else:
                await machine.start_as_template(BOOT_DEADLINE, None)
                await machine.save_state()
                (packed,) = work.glob("state-*.zst")
                unpack = ("-d", "-q", "-f", str(packed), "-o", str(new / STATE))
                await run_tool(self._reactor, TOOL_DEADLINE, "its memory cannot be unpacked", program(ZSTD), *unpack)
            (work / DISK).rename(new / TEMPLATE_DISK)
            words = ("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", TEMPLATE_DISK, str(new / OVERLAY))
            await run_tool(self._reactor, TOOL_DEADLINE, "its disk cannot be used", program(QEMU_IMG), *words)
            files = list(new.iterdir())
            for file in files:
                # QEMU opens memory to write, though it does not.
                file.chmod(0o600 if file.name == MEMORY else 0o400)
            await sync(*files)
            told = {"image": spec.image.name, "digest": spec.image.digest, "files": {f.name: _stamp(f) for f in files}}
            write_private(new / RECORD, json.dumps(told).encode("utf-8"))
            shutil.rmtree(place, ignore_errors=True)
            new.rename(place)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            await machine.destroy()

    def _remove_unused(self, image: Image) -> None:
        """Those of earlier builds of the image, and old ones. Clones have their own name for a template's disk."""
        for record in (image.beside / FOLDER).glob(f"*/{RECORD}"):
            try:
                told = json.loads(record.read_bytes())
                earlier = told["image"] == image.name and told["digest"] != image.digest
                if earlier or time.time() - record.stat().st_mtime > UNUSED:
                    shutil.rmtree(record.parent, ignore_errors=True)
                    record.parent.with_suffix(".lock").unlink(missing_ok=True)
            except (OSError, ValueError, KeyError):
                continue  # being made or removed at this moment


def _whole(place: Path) -> bool:
    """Whether nothing was written to it, and nothing cut off, since it was made."""
    try:
        files = json.loads((place / RECORD).read_bytes())["files"]
        return bool(files) and all(_stamp(place / name) == stamp for name, stamp in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _without_nothing(source: Path, target: Path) -> None:
    """Copy a file whose blocks of zeros need no room, in one piece: it was written here and there."""
    with source.open("rb", buffering=0) as old, target.open("xb", buffering=0) as new:
        while block := old.read(BLOCK):
            if block.count(0) == len(block):
                new.seek(len(block), os.SEEK_CUR)
            else:
                new.write(block)
        new.truncate(source.stat().st_size)


def _read_ahead(path: Path) -> None:
    """In order, before a guest wants it page by page."""
    with path.open("rb") as file:
        end = 0
        while True:
            try:
                begin = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:  # nothing but zeros follows
                return
            end = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_WILLNEED)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    import fcntl  # not on Windows, where this module is imported but no QEMU is driven

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


class _HangUp(Protocol):
    """A template has no business with anybody."""

    def connectionMade(self) -> None:
        assert self.transport is not None
        self.transport.loseConnection()
