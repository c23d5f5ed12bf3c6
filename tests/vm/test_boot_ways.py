"""One disk, started in every way that volunteers' machines start one, does the worker example in each."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from host_agent.hypervisors.images import Image

from .test_job import DEADLINE, ROOT, example

pytestmark = pytest.mark.vm


WAYS = [("bios", "virtio"), ("bios", "ide"), ("uefi", "virtio"), ("uefi", "sata")]
if os.environ.get("VMWRAPPER_LONG"):  # the pairs that remain: each of their parts is in one above
    WAYS += [("bios", "sata"), ("uefi", "ide")]


@pytest.mark.parametrize(("firmware", "bus"), WAYS)
def test_the_example_after_a_start_from_the_disk(
    image: Image, firmware: str, bus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "images" / "CernVM"
    place.mkdir(parents=True)
    manifest = json.loads((image.directory / "image.json").read_text())
    for key in ("kernel", "initrd"):
        del manifest["files"][manifest.pop(key)]
    described = {**manifest, "firmware": firmware, "disk_bus": bus, "warm_start": False, "disk": "disk.qcow2"}
    (place / "image.json").write_text(json.dumps(described))
    os.link(image.disk, place / "disk.qcow2")
    monkeypatch.setenv("VMWRAPPER_IMAGES", str(place.parent))
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))
    slot = tmp_path / "slot"
    done = subprocess.run(example(slot), capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (slot / "out").read_bytes() == (ROOT / "examples" / "worker" / "in").read_bytes().upper()
