"""A template belongs to what it was made from; whoever has no use for one boots, and the log says why."""

from __future__ import annotations

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

from host_agent.hypervisors import qemu_templates
from host_agent.hypervisors.base import HypervisorError, MachineSpec
from host_agent.hypervisors.images import NO_IMAGE
from host_agent.hypervisors.qemu_options import KVM, TCG
from host_agent.hypervisors.qemu_templates import Templates
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
        if "error" in event:
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
