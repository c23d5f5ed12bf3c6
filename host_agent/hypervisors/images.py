"""A guest image on this host: a directory with `image.json` and the files that it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs

from common.errors import ConfigError

MANIFEST = "image.json"


@attrs.frozen
class Image:
    """A built image. Paths are absolute; `digest` identifies its content (hex SHA-256 over all inputs)."""

    name: str
    directory: Path
    digest: str
    architecture: str  # as in `uname -m`
    disk: Path  # qcow2, never written by a running VM
    kernel: Path | None
    initrd: Path | None
    cmdline: str
    memory_mb: int  # what a VM of this image gets unless told otherwise


def load_image(directory: Path) -> Image:
    """Read `image.json`; ConfigError says what is wrong with it."""
    manifest = directory / MANIFEST
    try:
        data: dict[str, Any] = json.loads(manifest.read_text("utf-8"))
        image = Image(
            name=str(data["name"]),
            directory=directory.resolve(),
            digest=str(data["digest"]),
            architecture=str(data["architecture"]),
            disk=_member(directory, data["disk"]),
            kernel=_member(directory, data["kernel"]) if data.get("kernel") else None,
            initrd=_member(directory, data["initrd"]) if data.get("initrd") else None,
            cmdline=str(data.get("cmdline", "")),
            memory_mb=int(data["memory_mb"]),
        )
    except FileNotFoundError:
        raise ConfigError(
            f"{directory} is not a guest image: it has no {MANIFEST}", "build one with: vmctl image build"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{manifest}: cannot be read as an image's description ({error!r})") from None
    for part in (image.disk, image.kernel, image.initrd):
        if part is not None and not part.is_file():
            raise ConfigError(f"{manifest}: names {part.name}, which is not there", "build the image again")
    return image


def _member(directory: Path, name: object) -> Path:
    path = Path(str(name))
    if path.name != str(name):
        raise ValueError(f"{name!r} is not a plain file name")
    return directory.resolve() / path
