"""Packages of images: whole, as differences, and altered on their way."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from common.errors import ConfigError
from host_agent.hypervisors.images import Image, load_image
from vm_images.package import install_package, pack_image

NOISE = random.Random(1).randbytes(400_000)


def make(store: Path, name: str, disk: bytes, kernel: bytes = b"kernel") -> Image:
    place = store / name
    place.mkdir(parents=True)
    files = {}
    for part, content in (("disk.qcow2", disk), ("vmlinux", kernel)):
        (place / part).write_bytes(content)
        files[part] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    digest = hashlib.sha256(disk).hexdigest()
    manifest = {"name": name, "digest": digest, "architecture": "x86_64", "disk": "disk.qcow2", "memory_mb": 64}
    (place / "image.json").write_text(json.dumps({**manifest, "kernel": "vmlinux", "files": files}))
    return load_image(place)


def test_a_whole_image(tmp_path: Path) -> None:
    image = make(tmp_path / "mine", "one", NOISE)
    package = pack_image(image, tmp_path / "one.pkg")
    found = install_package(package, tmp_path / "theirs")
    assert found.disk.read_bytes() == NOISE
    assert [each.name for each in (tmp_path / "theirs").iterdir()] == ["one"]


def test_an_update_is_small_and_exact(tmp_path: Path) -> None:
    old = make(tmp_path / "mine", "old", NOISE)
    changed = NOISE[:200_000] + b"changed" + NOISE[200_000:]
    update = pack_image(make(tmp_path / "mine", "new", changed), tmp_path / "update.pkg", old)
    assert update.stat().st_size < 30_000
    theirs = tmp_path / "theirs"
    install_package(pack_image(old, tmp_path / "old.pkg"), theirs)
    assert install_package(update, theirs).disk.read_bytes() == changed


def test_an_update_of_an_image_that_is_not_here(tmp_path: Path) -> None:
    old = make(tmp_path / "mine", "old", NOISE)
    update = pack_image(make(tmp_path / "mine", "new", NOISE + b"x"), tmp_path / "update.pkg", old)
    with pytest.raises(ConfigError, match="a difference from the image"):
        install_package(update, tmp_path / "theirs")


@pytest.mark.parametrize("how", ["truncated", "altered", "empty"])
def test_what_was_damaged_is_refused_and_leaves_nothing(tmp_path: Path, how: str) -> None:
    package = pack_image(make(tmp_path / "mine", "one", NOISE), tmp_path / "one.pkg")
    content = package.read_bytes()
    middle = len(content) // 2
    damaged = {
        "truncated": content[:middle],
        "altered": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "empty": b"",
    }
    package.write_bytes(damaged[how])
    with pytest.raises(ConfigError) as caught:
        install_package(package, tmp_path / "theirs")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "theirs").exists() or list((tmp_path / "theirs").iterdir()) == []


def test_a_package_does_not_write_more_than_it_says(tmp_path: Path) -> None:
    image = make(tmp_path / "mine", "one", b"\0" * 1000)
    package = pack_image(image, tmp_path / "one.pkg")
    changed = package.read_bytes().replace(b'"bytes": 1000', b'"bytes": 10  ')
    package.write_bytes(changed)
    with pytest.raises(ConfigError, match="too long"):
        install_package(package, tmp_path / "theirs")


def test_names_stay_in_the_store(tmp_path: Path) -> None:
    package = pack_image(make(tmp_path / "mine", "one", b"x"), tmp_path / "one.pkg")
    package.write_bytes(package.read_bytes().replace(b'"vmlinux": {', b'"../vmli": {'))
    with pytest.raises(ConfigError, match="plain file name"):
        install_package(package, tmp_path / "theirs")
