from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from host_agent.hypervisors.images import find_image, image_store, list_images, load_image


def make(store: Path, name: str, **changes: Any) -> Path:
    place = store / name
    place.mkdir(parents=True)
    (place / "disk.qcow2").touch()
    value = {
        "name": name,
        "digest": "0",
        "architecture": "x86_64",
        "disk": "disk.qcow2",
        "memory_mb": 256,
    }
    (place / "image.json").write_text(json.dumps({**value, **changes}))
    return place


def test_by_name_and_by_path(tmp_path: Path) -> None:
    place = make(tmp_path, "one")
    assert find_image("one", tmp_path) == find_image(str(place), tmp_path) == load_image(place)


def test_unknown_name_lists_what_is_there(tmp_path: Path) -> None:
    make(tmp_path, "one")
    with pytest.raises(ConfigError, match="one"):
        find_image("two", tmp_path)


def test_list_passes_over_what_is_no_image(tmp_path: Path) -> None:
    make(tmp_path, "b")
    make(tmp_path, "a")
    make(tmp_path, "broken", memory_mb="many")
    make(tmp_path, ".half.1.new")
    (tmp_path / "other").mkdir()
    assert [image.name for image in list_images(tmp_path)] == ["a", "b"]
    assert list_images(tmp_path / "none") == []


@pytest.mark.parametrize("disk", ["../disk.qcow2", "/etc/passwd", "missing.qcow2"])
def test_files_stay_in_the_directory(tmp_path: Path, disk: str) -> None:
    place = make(tmp_path, "one", disk=disk)
    with pytest.raises(ConfigError):
        load_image(place)


def test_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMWRAPPER_IMAGES", "/chosen")
    assert image_store() == Path("/chosen")
    monkeypatch.delenv("VMWRAPPER_IMAGES")
    assert image_store().parts[-2:] == ("vmwrapper", "images")
