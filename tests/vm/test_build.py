"""The builder for real: the same bytes twice, and recipes that cannot be built."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from host_agent.hypervisors.images import Image, load_image, verify_image
from vm_images.builder import build_image
from vm_images.cache import Cache, default_cache
from vm_images.debian import debian_layer, kernels_layer
from vm_images.recipe import extended, load_recipe
from vm_images.tools import BuildError
from vm_images.wheels import wheels_layer

from .ordinary_user import give, python, take_sources


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


# `vmctl image` alone: the rest of vmctl needs libraries that Debian's own Python need not have.
_VMCTL_IMAGE = """
import argparse, sys
from host_agent.vmctl import image
parser = argparse.ArgumentParser()
image.add_parser(parser.add_subparsers())
options = parser.parse_args()
sys.exit(options.func(options))
"""


def test_an_ordinary_user_builds_the_same_bytes(image: Image) -> None:
    """Without root, in user namespaces. Debian comes from the cache, but with VMWRAPPER_LONG set is made anew too."""
    place = Path(tempfile.mkdtemp(prefix="vmwrapper-user-"))  # pytest's own directories are root's alone
    try:
        take_sources(place)
        cache, recipe = Cache(default_cache()), load_recipe("debian-minimal")
        layers = [kernels_layer(cache, recipe), wheels_layer(cache, recipe.python, recipe.architecture)[1]]
        if not os.environ.get("VMWRAPPER_LONG"):
            layers.append(debian_layer(cache, recipe)[1])
        for layer in layers:
            shutil.copytree(layer, place / "cache" / layer.parent.name / layer.name)
        give(place)
        words = ["image", "build", "--cache", str(place / "cache"), "--output", str(place / "images")]
        done = python(place, _VMCTL_IMAGE, *words)
        assert done.returncode == 0, done.stderr
        theirs = load_image(place / "images" / image.name)
        assert theirs.disk.stat().st_uid != 0
        assert theirs.disk.read_bytes() == image.disk.read_bytes()
        # Nothing is left that belongs to a user of a namespace, whom its owner could not remove.
        assert {path.lstat().st_uid for path in place.rglob("*")} == {theirs.disk.stat().st_uid}
    finally:
        shutil.rmtree(place, ignore_errors=True)
