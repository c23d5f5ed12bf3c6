from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import ConfigError
from vm_images.recipe import RECIPES, extended, load_recipe
from vm_images.rootfs import packed
from vm_images.tools import BuildError

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


def test_a_recipe_that_extends_another_adds_to_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\nextends = "debian-minimal"\npackages = ["bc"]\nfiles = ["data:/srv/data"]\n')
    recipe, base = load_recipe(str(path)), load_recipe("debian-minimal")
    assert recipe.packages == (*base.packages, "bc")
    assert recipe.files == (f"{tmp_path}/data:/srv/data",)
    assert (recipe.name, recipe.kernel) == ("mine", base.kernel)


def test_extending_in_a_circle(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('name = "a"\nextends = "a.toml"\n')
    with pytest.raises(ConfigError, match="circle"):
        load_recipe(str(path))


def test_added_on_the_command_line() -> None:
    recipe = extended(load_recipe("debian-minimal"), ["bc"], ["/etc/hostname:/srv/name"])
    assert "bc" in recipe.packages and recipe.files == ("/etc/hostname:/srv/name",)
    with pytest.raises(ConfigError, match="plain name"):
        extended(recipe, ["bc; reboot"], [])
    for wrong in ("no-target", "a:relative", "a:/../x"):
        with pytest.raises(ConfigError, match="is not like"):
            extended(recipe, [], [wrong])


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="none cannot be copied into the image"):
        packed(str(tmp_path / "none"), "/srv/x")
