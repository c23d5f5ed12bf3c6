from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import ConfigError
from vm_images.recipe import RECIPES, load_recipe

TEXT = (RECIPES / "debian-minimal.toml").read_text("utf-8")


def test_every_recipe_of_ours_can_be_read() -> None:
    for path in RECIPES.glob("*.toml"):
        assert load_recipe(path.stem).name == path.stem
        assert load_recipe(str(path)) == load_recipe(path.stem)


def test_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("no-such")
    assert "debian-minimal" in caught.value.hint


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("memory_mb = 256", "memory_mb = 0", "memory_mb"),
        ("memory_mb = 256", "memory_mb = true", "memory_mb"),
        ("memory_mb = 256", "", "'memory_mb' is missing"),
        ("memory_mb = 256", "memory_mb = 256\nmemroy_mb = 1", "memroy_mb"),
        ('packages = ["python3", "busybox-static"]', 'packages = ["python3; reboot"]', "plain name"),
        ('packages = ["python3", "busybox-static"]', 'packages = "python3"', "list of strings"),
        ('"virtio_ring"', '"../evil"', "module"),
        ('python = "3.11"', 'python = "3"', "3.11"),
        ('architecture = "x86_64"', 'architecture = "riscv64"', "riscv64"),
        ('release = "bookworm"', "release = bookworm", "cannot be read"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in TEXT
    path = tmp_path / "mine.toml"
    path.write_text(TEXT.replace(old, new), "utf-8")
    with pytest.raises(ConfigError, match=words):
        load_recipe(str(path))
