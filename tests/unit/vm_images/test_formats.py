"""Disks for other hypervisors: the same content, and the same bytes each time."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

import pytest
from lxml import etree

from vm_images.formats import FORMATS

DIGEST = "ab" * 32


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    raw, path = tmp_path / "raw", tmp_path / "disk.qcow2"
    raw.write_bytes(b"start" + bytes(3 << 20) + b"end" + bytes((1 << 20) - 8))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path], check=True)
    return path


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_twice_is_the_same(disk: Path, tmp_path: Path, form: str) -> None:
    made = []
    for number in range(2):
        place = tmp_path / str(number)
        place.mkdir()
        made.append(FORMATS[form](disk, place, DIGEST, 256, "name").read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize("form", ["vdi", "vmdk"])
def test_what_is_in_it(disk: Path, tmp_path: Path, form: str) -> None:
    made = FORMATS[form](disk, tmp_path, DIGEST, 256, "name")
    subprocess.run(["qemu-img", "compare", "-q", disk, made], check=True)
    told = json.loads(subprocess.run(["qemu-img", "info", "--output=json", made], capture_output=True).stdout)
    assert told["format"] == form
    if form == "vmdk":
        assert told["format-specific"]["data"]["create-type"] == "streamOptimized"


def test_appliance(disk: Path, tmp_path: Path) -> None:
    made = FORMATS["ova"](disk, tmp_path, DIGEST, 512, "a & b")
    with tarfile.open(made) as archive:
        assert archive.getnames() == ["a & b.ovf", "a & b.mf", "disk.vmdk"]
        source = archive.extractfile("a & b.ovf")
        assert source is not None
        described = etree.fromstring(source.read())
    texts = [text for text in described.itertext() if text.strip()]
    assert {"512", "PIIX4", "virtio"} <= set(texts)
