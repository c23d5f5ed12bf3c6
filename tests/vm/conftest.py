"""Guest images for tests with real virtual machines, built through the cache: seconds, once Debian is in it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from common.errors import VMwrapperError
from host_agent.hypervisors.images import Image
from vm_images.builder import build_image
from vm_images.cache import Cache, default_cache
from vm_images.recipe import load_recipe
from vm_images.rootfs import SOURCES

STANDIN = Path(__file__).parent / "standin" / "main.py"


def _build(output: Path, sources: Path) -> Image:
    try:
        return build_image(load_recipe("debian-minimal"), output, Cache(default_cache()), sources=sources)
    except VMwrapperError as error:
        pytest.fail(f"the guest image cannot be built: {error.explain()}")


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The image as users have it, with the guest agent of this checkout."""
    return _build(tmp_path_factory.mktemp("images"), SOURCES)


@pytest.fixture(scope="session")
def standin_image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The same image with `standin/main.py` in the guest agent's place."""
    sources = tmp_path_factory.mktemp("sources")
    for package in ("common", "guest_agent"):
        (sources / package).mkdir()
        (sources / package / "__init__.py").touch()
    for part in ("privileged.py", "discovery.py", "iso9660.py", "exchange.py"):
        shutil.copyfile(SOURCES / "guest_agent" / part, sources / "guest_agent" / part)
    shutil.copyfile(SOURCES / "common" / "direct_io.py", sources / "common" / "direct_io.py")
    shutil.copyfile(STANDIN, sources / "guest_agent" / "main.py")
    return _build(tmp_path_factory.mktemp("standin"), sources)
