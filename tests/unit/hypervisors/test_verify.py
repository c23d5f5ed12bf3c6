"""An image whose files are not those of its manifest is refused before it is used."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from common.errors import ConfigError
from host_agent.hypervisors.images import check_image, load_image, verify_image


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))
    place = tmp_path / "one"
    place.mkdir()
    content = b"disk" * 1000
    (place / "disk.qcow2").write_bytes(content)
    files = {"disk.qcow2": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    manifest = {"name": "one", "digest": "d", "architecture": "x86_64", "disk": "disk.qcow2", "memory_mb": 64}
    (place / "image.json").write_text(json.dumps({**manifest, "files": files}))
    return place


def test_as_it_was_made(image: Path) -> None:
    assert verify_image(load_image(image)) == ["disk.qcow2"]
    assert check_image(load_image(image)).name == "one"


def test_truncated(image: Path) -> None:
    (image / "disk.qcow2").write_bytes(b"disk")
    with pytest.raises(ConfigError, match=r"disk\.qcow2 is truncated, it has 4 bytes instead of 4000"):
        check_image(load_image(image))


def test_altered_after_it_was_found_good(image: Path) -> None:
    check_image(load_image(image))
    (image / "disk.qcow2").write_bytes(b"risk" * 1000)
    with pytest.raises(ConfigError, match="altered"):
        check_image(load_image(image))


def test_unchanged_files_are_read_once(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_image(load_image(image))
    monkeypatch.setattr("host_agent.hypervisors.images.verify_image", lambda image: pytest.fail("read again"))
    check_image(load_image(image))
