"""The disk: Debian and the guest agent in a qcow2 file that starts by itself too, made without mounting anything."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

from .bootable import BOOT_AT, ROOT_AT, boot_partition, copy_into, write_table
from .cache import digest_of
from .debian import ROOT_TAR
from .ext4_times import set_times
from .kernel import DISK_INITRD, DISK_KERNEL
from .recipe import DISTRIBUTION, OURS, Recipe
from .tools import SOURCE_DATE_EPOCH, BuildError, as_root, remove_after, run

DISK = "disk.qcow2"
LABEL = "vmwrapper"  # of the root file system: guest/initrd-init finds it by that
AGENT = "usr/lib/vmwrapper-guest-agent"
GUEST = Path(__file__).parent / "guest"
SOURCES = Path(__file__).parent.parent  # where the packages `common` and `guest_agent` are
START = "start.py"
_PACKAGES = ("common", "guest_agent")
# Any fixed value: two images are never used as disks of one machine.
_UUID = "b1a2f0c4-6a1e-4d0e-9a3d-2f6f766d7772"


def agent_files(sources: Path = SOURCES) -> Iterator[tuple[str, Path]]:
    """Name in the agent's directory and file, of everything of ours that goes into the guest, sorted."""
    yield START, GUEST / START
    for package in _PACKAGES:
        for path in sorted((sources / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
                yield path.relative_to(sources).as_posix(), path


def agent_key(sources: Path = SOURCES) -> str:
    """Digest of our own sources that go into the guest."""
    parts: list[bytes | str] = [(GUEST / "init").read_bytes()]
    for name, path in agent_files(sources):
        parts += [name, path.read_bytes()]
    return digest_of(parts)


def make_disk(place: Path, recipe: Recipe, debian: Path, wheels: Path, boot: Path, sources: Path = SOURCES) -> Path:
    """Write `disk.qcow2` into `place`."""
    agent = place / "agent"
    raw = place / "disk.raw"
    with remove_after(place / "root") as root, remove_after(agent):
        # The guest installs no packages, and where this host gets its own is nobody's business.
        unpack: list[str | os.PathLike[str]] = [
            "tar",
            "-x",
            "-p",
            "--exclude=./etc/apt",
            "--exclude=./var/lib/apt",
            # The kernel makes the devices, and root of a user namespace may not.
            "--exclude=./dev/*",
            "-C",
            root,
        ]
        run([*as_root(), *unpack, "-f", debian / ROOT_TAR], "unpacking Debian")
        _collect(agent, wheels, sources)
        if recipe.agent:
            _install(root, agent, recipe)
        _take_init(root, recipe)
        _copy_files(root, recipe)
        _file_system(raw, root, recipe)
    return _finish(place, raw, recipe, boot)


def make_container_disk(place: Path, recipe: Recipe, root_tar: Path, boot: Path) -> Path:
    """The same from a root file system that has everything, the agent too."""
    raw = place / "disk.raw"
    with remove_after(place / "root") as root:
        unpack: list[str | os.PathLike[str]] = [*as_root(), "tar", "-x", "-p", "--numeric-owner", "-C", root]
        run([*unpack, "-f", root_tar], "unpacking the container")
        _file_system(raw, root, recipe)
    return _finish(place, raw, recipe, boot)


def _finish(place: Path, raw: Path, recipe: Recipe, boot: Path) -> Path:
    """Make it bootable, and a qcow2 file."""
    for part in (DISK_KERNEL, DISK_INITRD):
        shutil.copyfile(boot / part, place / part)
    fat = boot_partition(place, place / DISK_KERNEL, place / DISK_INITRD, recipe.cmdline)
    copy_into(raw, fat, BOOT_AT)
    write_table(raw, recipe.disk_gb << 30)
    for used in (fat, place / DISK_KERNEL, place / DISK_INITRD):
        used.unlink()
    try:
        run(
            ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "lazy_refcounts=on", raw, place / DISK],
            "writing the disk image",
        )
    finally:
        raw.unlink()
    return place / DISK


def _collect(agent: Path, wheels: Path, sources: Path) -> None:
    shutil.copytree(wheels, agent, dirs_exist_ok=True)
    for name, path in agent_files(sources):
        target = agent / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    for directory, _, files in os.walk(agent):
        Path(directory).chmod(0o755)
        for name in files:
            Path(directory, name).chmod(0o644)


def _install(root: Path, agent: Path, recipe: Recipe) -> None:
    what = "installing the guest agent"
    enter = as_root()
    run([*enter, "cp", "-r", "--no-preserve=ownership", agent, root / AGENT], what)
    # The guest's own Python, so that the byte code is the one that it will look for.
    run(
        [
            *enter,
            "chroot",
            root,
            f"/usr/bin/python{recipe.python}",
            *("-I", "-S", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", f"/{AGENT}"),
        ],
        "compiling the guest agent",
    )
    if recipe.init == DISTRIBUTION:
        python = f"/usr/bin/python{recipe.python}"
        command = [python, "-I", "-S", f"/{AGENT}/start.py", "--install", "--keep-files"]
        run([*enter, "chroot", root, *command], "making the guest agent a service")


def _take_init(root: Path, recipe: Recipe) -> None:
    """What the initrd hands over to."""
    place = root / "usr/lib/vmwrapper"
    if recipe.init == OURS:
        run([*as_root(), "install", "-D", "-m", "0755", GUEST / "init", place / "init"], "installing the init")
    else:
        run([*as_root(), "mkdir", "-p", place], "installing the init")
        run([*as_root(), "ln", "-s", "/sbin/init", place / "init"], "installing the init")


def _copy_files(root: Path, recipe: Recipe) -> None:
    """The recipe's own files: owned by root, and unpacked inside, where no link can lead out."""
    for each in recipe.files:
        source, _, target = each.rpartition(":")
        unpack: list[str | os.PathLike[str]] = [*as_root(), "chroot", root, "tar", "-x", "-p", "-C", "/"]
        run(unpack, f"copying {source}", data=packed(source, target))


def packed(source: str, target: str) -> bytes:
    """A tar archive that puts a file or a directory at `target`: the same bytes for the same files."""
    content = io.BytesIO()

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = "root"
        info.mtime = SOURCE_DATE_EPOCH
        info.mode = 0o755 if info.isdir() or info.mode & 0o100 else 0o644
        return info

    try:
        with tarfile.open(fileobj=content, mode="w", format=tarfile.GNU_FORMAT) as archive:
            archive.add(source, target.lstrip("/"), filter=plain)
    except OSError as error:
        raise BuildError(f"{source} cannot be copied into the image: {error.strerror}") from None
    return content.getvalue()


def _file_system(raw: Path, root: Path, recipe: Recipe) -> None:
    with raw.open("wb") as file:
        file.truncate(recipe.disk_gb << 30)
    options = ["lazy_itable_init=1", "assume_storage_prezeroed=1", "root_owner=0:0", f"hash_seed={_UUID}"]
    options.append(f"offset={ROOT_AT}")
    run(
        [
            *as_root(),
            "mke2fs",
            *("-q", "-F", "-t", "ext4", "-O", "^metadata_csum", "-m", "0", "-b", "4096", "-L", LABEL),
            *("-U", _UUID, "-E", ",".join(options), "-J", "size=16"),
            *("-d", root, raw, f"{((recipe.disk_gb << 30) - ROOT_AT) >> 10}k"),
        ],
        "making the file system",
        env={"E2FSPROGS_FAKE_TIME": str(SOURCE_DATE_EPOCH)},
    )
    set_times(raw, ROOT_AT, SOURCE_DATE_EPOCH)
