"""A guest image on this host: a directory with `image.json` and the files that it names."""

from __future__ import annotations

import enum
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import attrs

from common.errors import ConfigError
from common.files import runtime_dir
from host_agent.wrapper.resolve import soft_link_target

MANIFEST = "image.json"


class Firmware(enum.Enum):
    """What starts an image without a kernel beside it."""

    BIOS = "bios"
    UEFI = "uefi"


class DiskBus(enum.Enum):
    """Where an image looks for its disk."""

    VIRTIO = "virtio"
    IDE = "ide"
    SATA = "sata"


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
    warm_start: bool = False  # its agent waits for settings that come through the line to the host
    firmware: Firmware = Firmware.BIOS
    disk_bus: DiskBus = DiskBus.VIRTIO

    @property
    def beside(self) -> Path:
        """Where what was made from it may be kept for its next use: where its disk is, which outlives a slot."""
        return self.directory.parent if self.disk.parent == self.directory else self.disk.parent


NO_IMAGE = Image("none", Path("/"), "", "", Path("/"), None, None, "", 64)  # for drivers whose guests have none


def load_image(directory: Path) -> Image:
    """Read `image.json`; ConfigError says what is wrong with it."""
    manifest = _followed(directory / MANIFEST)
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
            warm_start=bool(data.get("warm_start", False)),
            firmware=Firmware(data.get("firmware", "bios")),
            disk_bus=DiskBus(data.get("disk_bus", "virtio")),
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


def verify_image(image: Image) -> list[str]:
    """Read every file of an image and compare it with the manifest: their names; ConfigError says what is wrong."""
    manifest: dict[str, Any] = json.loads(_followed(image.directory / MANIFEST).read_text("utf-8"))
    files: dict[str, Any] = manifest.get("files", {})
    for name, expected in files.items():
        path = _member(image.directory, name)
        advice = "fetch or build the image again"
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                kind = "is truncated" if size < expected["bytes"] else "is too long"
                words = f"it has {size} bytes instead of {expected['bytes']}"
                raise ConfigError(f"the image {image.name} cannot be used: {name} {kind}, {words}", advice)
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    words = f"{name} was altered, its SHA-256 is not that of the manifest"
                    raise ConfigError(f"the image {image.name} cannot be used: {words}", advice)
        except (OSError, KeyError, TypeError) as error:
            raise ConfigError(f"the image {image.name} cannot be used: {name} ({error!r})", advice) from None
    return list(files)


def check_image(image: Image) -> Image:
    """The image, once its files are known to be those of its manifest. Files that have not changed are read once."""
    manifest = _followed(image.directory / MANIFEST).read_bytes()
    mark = hashlib.sha256(manifest)
    for path in (image.disk, image.kernel, image.initrd):
        if path is not None:
            stat = path.stat()
            mark.update(repr((str(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)).encode())
    known = runtime_dir() / "checked-images"
    known.mkdir(mode=0o700, exist_ok=True)
    seen = known / mark.hexdigest()
    if not seen.exists():
        verify_image(image)
        seen.touch(mode=0o600)
    return image


def image_store() -> Path:
    """Directory of this user's images: `VMWRAPPER_IMAGES`, or the place of user data."""
    if chosen := os.environ.get("VMWRAPPER_IMAGES"):
        return Path(chosen)
    data = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_DATA_HOME")
    return Path(data or Path.home() / ".local" / "share") / "vmwrapper" / "images"


def find_image(name_or_path: str, store: Path | None = None) -> Image:
    """An image by its name in the store, or by the path of its directory; ConfigError says what is there."""
    store = store or image_store()
    if Path(name_or_path).name != name_or_path or name_or_path in (".", ".."):
        return load_image(Path(name_or_path))
    if not (store / name_or_path).is_dir():
        known = ", ".join(image.name for image in list_images(store)) or "none"
        raise ConfigError(
            f"there is no guest image {name_or_path} in {store} (there: {known})",
            "build it with: vmctl image build",
        )
    return load_image(store / name_or_path)


def list_images(store: Path | None = None) -> list[Image]:
    """Every usable image of the store, by name. Directories that are no image are passed over."""
    found = []
    store = store or image_store()
    for directory in sorted(store.iterdir()) if store.is_dir() else ():
        if directory.name.startswith(".") or not (directory / MANIFEST).is_file():
            continue
        try:
            found.append(load_image(directory))
        except ConfigError:
            continue
    return found


def _followed(path: Path) -> Path:
    """The file that a BOINC client's link file stands for: images are not copied into slots."""
    target = soft_link_target(path)
    if target is not None:
        for slot in path.resolve().parents:  # the link begins there, and the image lies in a directory of it
            if (slot / target).is_file():
                return (slot / target).resolve()
    return path


def _member(directory: Path, name: object) -> Path:
    path = Path(str(name))
    if path.name != str(name):
        raise ValueError(f"{name!r} is not a plain file name")
    return _followed(directory.resolve() / path)


DEFAULT_IMAGE = "debian-minimal"


def image_for(vm: str, wanted: str) -> Image:
    """The image of a VM: the one asked for, else one with the VM's own name, else the default."""
    if wanted:
        return check_image(find_image(wanted))
    return check_image(find_image(vm if Path(vm).name == vm and (image_store() / vm).is_dir() else DEFAULT_IMAGE))
