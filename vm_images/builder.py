"""Builds a guest image: Debian, the agent's libraries, kernel and initrd, disk; each step kept for the next build."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import attrs

from common.errors import ConfigError
from host_agent.hypervisors.images import MANIFEST, Image, load_image

from . import formats
from .cache import Cache, digest_of
from .debian import PACKAGES, debian_layer, kernels_layer
from .frozen import container_files, frozen_layer
from .kernel import INITRD, KERNEL, boot_layer
from .oci import merge_container
from .recipe import OURS, Recipe, load_recipe
from .rootfs import DISK, SOURCES, agent_key, make_container_disk, make_disk, packed
from .tools import Progress, explain_os_error, remove_after, remove_tree
from .wheels import wheels_layer

_T = TypeVar("_T")
_OURS = ("builder.py", "rootfs.py", "bootable.py", "ext4_times.py")  # what decides how a disk is made


def build_image(
    recipe: Recipe,
    output: Path,
    cache: Cache,
    *,
    name: str = "",
    sources: Path = SOURCES,
    refresh: bool = False,
    form: str = "qcow2",
    progress: Progress = lambda line: None,
) -> Image:
    """Build `output/NAME` and return it. It appears there whole or not at all.

    `sources` holds the packages `common` and `guest_agent` that go into the guest; `refresh` fetches
    Debian anew instead of taking what the cache has; `form` is qcow2, which has a kernel and an initrd beside it, or
    one of FORMATS, for other hypervisors. Raises BuildError and ConfigError.
    """
    name = name or recipe.name
    if Path(name).name != name or name.startswith("."):
        raise ConfigError(f"{name!r} cannot name an image: it must be a plain file name")
    step = _Steps(progress)
    _, debian = step("Debian", lambda: debian_layer(cache, recipe, refresh=refresh))
    wheels_key, wheels = step("agent's libraries", lambda: wheels_layer(cache, recipe.python, recipe.architecture))
    kernels = step("kernels", lambda: kernels_layer(cache, recipe, refresh=refresh))
    boot_key, boot = step("kernel and initrd", lambda: boot_layer(cache, recipe, debian, kernels))
    ours = agent_key(sources)
    copies = [packed(*each.rpartition(":")[::2]) for each in recipe.files]
    without_paths = attrs.evolve(recipe, files=tuple(each.rpartition(":")[2] for each in recipe.files))
    mine = [(Path(__file__).parent / file).read_bytes() for file in _OURS]
    digest = digest_of(["image", repr(without_paths), _content_of(debian), wheels_key, boot_key, ours, *copies, *mine])

    def make(place: Path) -> None:
        make_disk(place, recipe, debian, wheels, boot, sources)
        for part in (KERNEL, INITRD):
            _share(boot / part, place / part)
        _describe(place, recipe, name=recipe.name, digest=digest, debian=debian, agent=ours)

    layer = step("disk", lambda: cache.layer("images", digest, make))
    if form != "qcow2":
        qcow2, form_digest = layer, digest_of([digest, form, Path(formats.__file__).read_bytes()])

        def convert(place: Path) -> None:
            disk = formats.FORMATS[form](qcow2 / DISK, place, form_digest, recipe.memory_mb, recipe.name)
            _describe_other(place, qcow2, disk, form_digest)

        layer = step(form, lambda: cache.layer("formats", form_digest, convert))
        digest = form_digest
    return step("done", lambda: _publish(layer, output, name, digest))


def build_from_container(
    archive: Path,
    recipe: Recipe,
    output: Path,
    cache: Cache,
    *,
    name: str,
    sources: Path = SOURCES,
    progress: Progress = lambda line: None,
) -> Image:
    """The same from a container: its file system, with our kernel, and the agent with a Python of its own."""
    if Path(name).name != name or name.startswith("."):
        raise ConfigError(f"{name!r} cannot name an image: it must be a plain file name")
    step = _Steps(progress)
    try:
        with archive.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"the container's archive {archive} cannot be read: {error.strerror}") from None
    _, debian = step("Debian", lambda: debian_layer(cache, recipe))
    wheels = step("agent's libraries", lambda: wheels_layer(cache, recipe.python, recipe.architecture))
    frozen_key, frozen = step("agent", lambda: frozen_layer(cache, recipe, debian, wheels, sources))
    kernels = step("kernels", lambda: kernels_layer(cache, recipe))
    boot_key, boot = step("kernel and initrd", lambda: boot_layer(cache, recipe, debian, kernels))
    mine = [(Path(__file__).parent / file).read_bytes() for file in (*_OURS, "oci.py", "oci_archive.py", "guest/init")]
    digest = digest_of(["container", content, repr(recipe), frozen_key, boot_key, *mine])

    def make(place: Path) -> None:
        root_tar = place / "root.tar"
        with remove_after(place / "layers") as work:
            container = merge_container(archive, root_tar, container_files(frozen), work)
        make_container_disk(place, recipe, root_tar, boot)
        root_tar.unlink()
        for part in (KERNEL, INITRD):
            _share(boot / part, place / part)
        _describe(place, recipe, name=name, digest=digest, debian=debian, agent=agent_key(sources))
        described: dict[str, Any] = json.loads((place / MANIFEST).read_text("utf-8"))
        described["packages"] = {}  # the container's own, of which we know nothing
        described["container"] = {"sha256": content, **attrs.asdict(container)}
        (place / MANIFEST).write_text(json.dumps(described, indent=2) + "\n", "utf-8")

    layer = step("disk", lambda: cache.layer("containers", digest, make))
    return step("done", lambda: _publish(layer, output, name, digest))


def _describe_other(place: Path, qcow2: Path, disk: Path, digest: str) -> None:
    manifest: dict[str, Any] = json.loads((qcow2 / MANIFEST).read_text("utf-8"))
    for key in ("kernel", "initrd", "cmdline"):
        del manifest[key]
    described = {**manifest, "digest": digest, "disk": disk.name, "warm_start": False, "files": _files(place, [disk])}
    (place / MANIFEST).write_text(json.dumps(described, indent=2) + "\n", "utf-8")


def _files(place: Path, paths: list[Path]) -> dict[str, dict[str, int | str]]:
    found: dict[str, dict[str, int | str]] = {}
    for path in paths:
        with path.open("rb") as file:
            total = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.name] = {"bytes": path.stat().st_size, "sha256": total}
        path.chmod(0o444)
    return found


def frozen_agent(cache: Cache) -> Path:
    """The layer of the agent with its own Python: that of the default image."""
    recipe = load_recipe("debian-minimal")
    _, debian = debian_layer(cache, recipe)
    wheels = wheels_layer(cache, recipe.python, recipe.architecture)
    return frozen_layer(cache, recipe, debian, wheels)[1]


def _content_of(debian: Path) -> str:
    # The same key can hold other versions after a refresh: the list of packages tells them apart.
    return (debian / PACKAGES).read_text("utf-8")


@attrs.define
class _Steps:
    """Says what is being done, and how long it took."""

    progress: Progress
    start: float = attrs.field(factory=time.monotonic)

    def __call__(self, what: str, do: Callable[[], _T]) -> _T:
        before = time.monotonic()
        result = do()
        now = time.monotonic()
        self.progress(f"{now - self.start:6.1f} s  {what} ({now - before:.1f} s)")
        return result


def _describe(place: Path, recipe: Recipe, *, name: str, digest: str, debian: Path, agent: str) -> None:
    files = _files(place, [place / part for part in (DISK, KERNEL, INITRD)])
    manifest = {
        "name": name,
        "digest": digest,
        "architecture": recipe.architecture,
        "disk": DISK,
        "kernel": KERNEL,
        "initrd": INITRD,
        "cmdline": recipe.cmdline,
        "memory_mb": recipe.memory_mb,
        "warm_start": recipe.agent and recipe.init == OURS,
        "release": recipe.release,
        "agent": agent,
        "files": files,
        "packages": dict(line.split(" ", 1) for line in (debian / PACKAGES).read_text("utf-8").splitlines()),
    }
    (place / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")


def _publish(layer: Path, output: Path, name: str, digest: str) -> Image:
    place = output / name
    try:
        if _digest_at(place) == digest:
            return load_image(place)
        output.mkdir(parents=True, exist_ok=True)
        work = output / f".{name}.{os.getpid()}.new"
        old = output / f".{name}.{os.getpid()}.old"
        try:
            work.mkdir()
            manifest: dict[str, Any] = json.loads((layer / MANIFEST).read_text("utf-8"))
            for part in manifest["files"]:
                _share(layer / part, work / part)
            (work / MANIFEST).write_text(json.dumps({**manifest, "name": name}, indent=2) + "\n", "utf-8")
            if place.exists():
                place.rename(old)
            work.rename(place)
        finally:
            remove_tree(work)
            remove_tree(old)
    except OSError as error:
        raise explain_os_error(f"writing the image to {place}", error) from None
    return load_image(place)


def _digest_at(place: Path) -> str:
    try:
        return load_image(place).digest
    except ConfigError:
        return ""


def _share(source: Path, target: Path) -> None:
    """A second name for a read-only file, or a copy of it where that cannot be."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
        target.chmod(0o444)
