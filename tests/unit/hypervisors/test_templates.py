"""A template belongs to what it was made from; whoever has no use for one boots, and the log says why."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import reactor
from twisted.internet.protocol import Factory
from twisted.logger import LogEvent, globalLogPublisher

from host_agent import exchange
from host_agent.hypervisors import qemu_options, qemu_templates
from host_agent.hypervisors.base import HypervisorError, MachineSpec
from host_agent.hypervisors.images import NO_IMAGE
from host_agent.hypervisors.qemu_options import KVM, TCG, MemoryFile
from host_agent.hypervisors.qemu_templates import Templates
from host_agent.hypervisors.qemu_wiring import Wires
from tests.contract.hypervisor_contract import Told

VERSIONS = {"told": "QEMU emulator version 7.2.0"}


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MachineSpec:
    async def run_tool(*words: Any) -> str:
        return f"{VERSIONS['told']}\nCopyright"

    program = tmp_path / "qemu"
    program.touch()
    monkeypatch.setattr(qemu_templates, "run_tool", run_tool)
    monkeypatch.setattr(qemu_templates, "program", lambda name: str(program))
    image = attrs.evolve(
        NO_IMAGE,
        name="made",
        directory=tmp_path / "made",
        digest="11",
        architecture=platform.machine(),
        disk=tmp_path / "made" / "disk",
        kernel=tmp_path / "made" / "kernel",
        initrd=tmp_path / "made" / "initrd",
        cmdline="quiet",
        warm_start=True,
    )
    return MachineSpec("vm", "g-1", image, tmp_path / "vm", 256, 1, {61613: Factory()}, b"{}", Told())


def image(**changes: Any) -> Any:
    return lambda spec: attrs.evolve(spec, image=attrs.evolve(spec.image, **changes))


@pytest.mark.parametrize(
    "change",
    [
        image(digest="12"),  # another build of it: also what has another agent in it
        image(cmdline="quiet debug"),
        lambda spec: attrs.evolve(spec, memory_mb=128),
        lambda spec: attrs.evolve(spec, cpus=2),
        lambda spec: attrs.evolve(spec, services={61613: Factory(), 61615: Factory()}),
    ],
)
@ensureDeferred
async def test_what_a_template_belongs_to(spec: MachineSpec, change: Any) -> None:
    before = await Templates(reactor)._key(spec, TCG)
    assert await Templates(reactor)._key(change(spec), TCG) != before
    same = attrs.evolve(spec, name="other", instance="g-2", directory=spec.directory / "x", guest_config=b"secret")
    assert await Templates(reactor)._key(same, TCG) == before


@ensureDeferred
async def test_another_qemu_and_another_way_to_run_it(spec: MachineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    before = await Templates(reactor)._key(spec, TCG)
    assert await Templates(reactor)._key(spec, KVM) != before
    monkeypatch.setitem(VERSIONS, "told", "QEMU emulator version 8.0.0")
    assert await Templates(reactor)._key(spec, TCG) != before


@pytest.fixture
def said() -> Iterator[list[str]]:
    told: list[str] = []

    def observe(event: LogEvent) -> None:
        # The log is the whole process's: an earlier test's parts may still complain of something.
        if "error" in event and event["log_namespace"] == Templates._log.namespace:
            told.append(str(event["error"]))

    publisher: Any = globalLogPublisher
    publisher.addObserver(observe)
    yield told
    publisher.removeObserver(observe)


@ensureDeferred
async def test_a_vm_boots_when_there_can_be_no_template(
    spec: MachineSpec, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    async def make(self: Templates, *words: Any) -> None:
        raise HypervisorError("its memory cannot be unpacked: the disk is full")

    spec.image.directory.mkdir()
    monkeypatch.setattr(Templates, "_make", make)
    assert await Templates(reactor).clone_for(spec, TCG) is None
    assert said == ["its memory cannot be unpacked: the disk is full"]


@ensureDeferred
async def test_a_vm_boots_while_another_process_makes_the_template(spec: MachineSpec, said: list[str]) -> None:
    spec.image.directory.mkdir()
    key = await Templates(reactor)._key(spec, TCG)
    place = spec.image.beside / qemu_templates.FOLDER
    place.mkdir()
    with qemu_templates._locked(place / f"{key}.lock") as mine:
        assert mine
        assert await Templates(reactor).clone_for(spec, TCG) is None
    assert said == ["another process makes it at this moment"]


@ensureDeferred
async def test_an_image_that_does_not_want_one(spec: MachineSpec) -> None:
    assert await Templates(reactor).clone_for(image(warm_start=False)(spec), TCG) is None


def test_what_was_written_to_since_is_no_template(tmp_path: Path) -> None:
    assert not qemu_templates._whole(tmp_path)
    memory = tmp_path / qemu_templates.MEMORY
    memory.write_bytes(b"of a guest")
    record = {"files": {memory.name: qemu_templates._stamp(memory)}}
    (tmp_path / qemu_templates.RECORD).write_text(json.dumps(record))
    assert qemu_templates._whole(tmp_path)
    made = memory.stat()
    memory.write_bytes(b"of another")
    os.utime(memory, ns=(made.st_atime_ns, made.st_mtime_ns + 1))
    assert not qemu_templates._whole(tmp_path)
    memory.write_bytes(b"of a")
    os.utime(memory, ns=(made.st_atime_ns, made.st_mtime_ns))
    assert not qemu_templates._whole(tmp_path)
    memory.unlink()
    assert not qemu_templates._whole(tmp_path)


def test_memory_without_its_zeros(tmp_path: Path) -> None:
    block = qemu_templates.BLOCK
    content = b"\0" * block + b"x" * block + b"\0" * (3 * block) + b"y" + b"\0" * (2 * block - 1)
    (tmp_path / "old").write_bytes(content)
    qemu_templates._without_nothing(tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == content
    assert (tmp_path / "new").stat().st_blocks * 512 <= 3 * block
    qemu_templates._read_ahead(tmp_path / "new")


@pytest.mark.parametrize("shared", [True, False])
def test_a_guest_whose_memory_is_a_file(spec: MachineSpec, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_options, "program", lambda name: name)
    memory = MemoryFile(Path("/a,b/memory"), shared)
    argv = qemu_options.command_line(spec, TCG, Path("disk"), Wires("", "", ""), None, memory)
    backend = argv[argv.index("-object") + 1].replace(",,", "\0").split(",")
    assert backend[0] == "memory-backend-file"
    settings = dict(word.split("=") for word in backend[1:])
    assert settings["size"] == "256M"
    assert settings["share"] == ("on" if shared else "off"), "what a clone writes is its own"
    assert settings["mem-path"] == "/a\0b/memory"
    assert f"memory-backend={settings['id']}" in argv[argv.index("-M") + 1]
    plain = qemu_options.command_line(spec, TCG, Path("disk"), Wires("", "", ""), None)
    assert "-object" not in plain


@pytest.mark.parametrize(("accelerator", "expected"), [(TCG, True), (KVM, False)])
def test_an_emulated_guest_of_our_own_image_has_an_exchange_disk(
    spec: MachineSpec, accelerator: tuple[str, ...], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of its devices: the places of all others are those of states that were made without it."""
    monkeypatch.setattr(qemu_options, "program", lambda name: name)
    direct = attrs.evolve(spec, image=attrs.evolve(spec.image, kernel=Path("/kernel")))
    argv = qemu_options.command_line(direct, accelerator, Path("disk"), Wires("", "", ""), None)
    devices = [argv[index + 1] for index, word in enumerate(argv) if word == "-device"]
    assert [device for device in devices if exchange.SERIAL in device] == (devices[-1:] if expected else [])
    other = attrs.evolve(spec, image=attrs.evolve(spec.image, kernel=None))
    assert exchange.SERIAL not in " ".join(
        qemu_options.command_line(other, accelerator, Path("disk"), Wires("", "", ""), None)
    )
