"""The builder for real: the same bytes twice, and recipes that cannot be built."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from host_agent.hypervisors.images import Image, verify_image
from vm_images.builder import build_image
from vm_images.cache import Cache, default_cache
from vm_images.recipe import extended, load_recipe
from vm_images.tools import BuildError


def test_two_builds_are_the_same_bytes(image: Image, tmp_path: Path) -> None:
    """Debian is taken from the cache, everything else is made anew: in another place, at another time."""
    cache = tmp_path / "cache"
    cache.mkdir()
    shutil.copytree(default_cache() / "debian", cache / "debian", copy_function=os.link)
    again = build_image(load_recipe("debian-minimal"), tmp_path / "images", Cache(cache))
    for one, other in ((image.disk, again.disk), (image.kernel, again.kernel), (image.initrd, again.initrd)):
        assert one is not None and other is not None
        assert one.read_bytes() == other.read_bytes(), one.name
    assert set(verify_image(again)) == {"disk.qcow2", "vmlinux", "initrd"}


def test_an_unknown_package_is_one_sentence_and_no_image(tmp_path: Path) -> None:
    recipe = extended(load_recipe("debian-minimal"), ["no-such-package"], [])
    with pytest.raises(BuildError, match="no-such-package") as caught:
        build_image(recipe, tmp_path / "images", Cache(tmp_path / "cache"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "images").exists()
