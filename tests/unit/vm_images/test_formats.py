"""Disks for other hypervisors: the same content, and the same bytes each time."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from vm_images.formats import FORMATS, with_content_id
from vm_images.tools import BuildError

DIGEST = "ab" * 32


def _descriptor(content_id: str) -> bytes:
    return f"# Disk DescriptorFile\nversion=1\nCID={content_id}\nparentCID=ffffffff\n\n# Extent\n".encode("ascii")


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


@given(drawn=st.integers(0, 2**32 - 1), first=st.integers(0, 2**32 - 1))
def test_a_descriptor_is_the_same_whatever_id_was_drawn(drawn: int, first: int) -> None:
    """As QEMU writes it: with one id, then with another over it, whose zero may leave an end of the longer text."""
    longer, shorter = sorted((_descriptor(f"{drawn:x}"), _descriptor(f"{first:x}")), key=len, reverse=True)
    written = (shorter + b"\0" + longer[len(shorter) + 1 :]).ljust(512, b"\0")
    assert with_content_id(written, DIGEST[:8]) == _descriptor(DIGEST[:8]).ljust(512, b"\0")


@pytest.mark.parametrize("descriptor", [b"", bytes(512), _descriptor("1").replace(b"\nCID", b"\nID"), _descriptor("1")])
def test_a_descriptor_without_an_id_or_room(descriptor: bytes) -> None:
    with pytest.raises(BuildError, match="descriptor"):
        with_content_id(descriptor, DIGEST[:8])


def test_appliance(disk: Path, tmp_path: Path) -> None:
    made = FORMATS["ova"](disk, tmp_path, DIGEST, 512, "a & b")
    with tarfile.open(made) as archive:
        assert archive.getnames() == ["a & b.ovf", "a & b.mf", "disk.vmdk"]
        source = archive.extractfile("a & b.ovf")
        assert source is not None
        described = etree.fromstring(source.read())
    texts = [text for text in described.itertext() if text.strip()]
    assert {"512", "PIIX4", "virtio"} <= set(texts)
