"""The builder with its slow steps replaced: what it publishes, and when it does nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from common.errors import ConfigError
from guest_agent.privileged import LINE
from host_agent.hypervisors.images import Image
from host_agent.hypervisors.qemu_options import HOST_LINE
from vm_images import builder
from vm_images.builder import build_image
from vm_images.cache import Cache
from vm_images.recipe import Recipe, load_recipe
from vm_images.rootfs import GUEST, agent_files, agent_key
from vm_images.tools import BuildError


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    place = tmp_path / "sources"
    for package in ("common", "guest_agent"):
        (place / package / "__pycache__").mkdir(parents=True)
        (place / package / "__init__.py").write_text("")
        (place / package / "__pycache__" / "x.pyc").write_text("")
    return place


class Steps:
    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: Path) -> None:
        self.made = 0
        self.lines: list[str] = []
        self._sources, self._tmp_path = sources, tmp_path
        debian, boot = tmp_path / "debian", tmp_path / "boot"
        for place in (debian, boot):
            place.mkdir()
        (debian / "packages.txt").write_text("python3 3.11\n")
        (boot / "vmlinux").write_text("kernel")
        (boot / "initrd").write_text("initrd")
        monkeypatch.setattr(builder, "debian_layer", lambda cache, recipe, refresh: ("d", debian))
        monkeypatch.setattr(builder, "wheels_layer", lambda cache, python, architecture: ("w", tmp_path))
        monkeypatch.setattr(builder, "kernels_layer", lambda cache, recipe, refresh: tmp_path)
        monkeypatch.setattr(builder, "boot_layer", lambda cache, recipe, debian, kernels: ("b", boot))
        monkeypatch.setattr(builder, "make_disk", self.make_disk)

    def make_disk(self, place: Path, recipe: Recipe, debian: Path, wheels: Path, boot: Path, sources: Path) -> None:
        self.made += 1
        (place / "disk.qcow2").write_text(f"disk {self.made}")

    def build(self, name: str = "") -> Image:
        return build_image(
            load_recipe("debian-minimal"),
            self._tmp_path / "images",
            Cache(self._tmp_path / "cache"),
            name=name,
            sources=self._sources,
            progress=self.lines.append,
        )


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: Path) -> Steps:
    return Steps(tmp_path, monkeypatch, sources)


def test_manifest(steps: Steps) -> None:
    image = steps.build("mine")
    manifest = json.loads((image.directory / "image.json").read_text())
    assert (image.name, image.memory_mb, image.directory.name) == ("mine", 256, "mine")
    assert manifest["files"]["disk.qcow2"]["sha256"] == hashlib.sha256(image.disk.read_bytes()).hexdigest()
    assert manifest["packages"] == {"python3": "3.11"}
    assert not image.disk.stat().st_mode & 0o222
    assert any("disk" in line and " s " in line for line in steps.lines)


def test_nothing_changed(steps: Steps) -> None:
    first = steps.build().disk.stat()
    second = steps.build().disk.stat()
    assert (steps.made, first.st_ino) == (1, second.st_ino)


def test_changed_agent_replaces_the_image_whole(steps: Steps, sources: Path) -> None:
    before = steps.build()
    (sources / "guest_agent" / "new.py").write_text("")
    after = steps.build()
    assert before.digest != after.digest
    assert after.disk.read_text() == "disk 2"
    assert [p.name for p in after.directory.parent.iterdir()] == ["debian-minimal"]


def test_failure_keeps_the_old_image(steps: Steps, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = steps.build()
    (sources / "guest_agent" / "new.py").write_text("")

    def fail(*_: object) -> None:
        raise BuildError("no")

    monkeypatch.setattr(builder, "make_disk", fail)
    with pytest.raises(BuildError):
        steps.build()
    assert before.disk.read_text() == "disk 1"


@pytest.mark.parametrize("name", ["../out", "a/b", ".hidden"])
def test_name_stays_in_its_place(steps: Steps, name: str) -> None:
    with pytest.raises(ConfigError, match="plain file name"):
        steps.build(name)


def test_byte_code_of_this_host_stays_here(sources: Path) -> None:
    names = [name for name, _ in agent_files(sources)]
    assert names == ["start.py", "common/__init__.py", "guest_agent/__init__.py"]


def test_key_follows_names_and_content(sources: Path) -> None:
    keys = {agent_key(sources)}
    (sources / "common" / "a.py").write_text("1")
    keys.add(agent_key(sources))
    (sources / "common" / "a.py").rename(sources / "common" / "b.py")
    keys.add(agent_key(sources))
    assert len(keys) == 3


def test_the_init_knows_the_line_to_the_host() -> None:
    """By the name that the driver gives it: a machine without one asks DHCP, which the others do not wait for."""
    assert f'"$name" = {HOST_LINE} ]' in (GUEST / "init").read_text()
    assert HOST_LINE == LINE
