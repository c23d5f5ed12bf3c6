"""The boot layer: the kernel uncompressed for a PVH start with a small initrd of virtio modules; and for machines that
start from the disk, the kernel as Debian has it with an initrd that knows more kinds of disks."""

from __future__ import annotations

import hashlib
import re
import stat
import struct
import tarfile
from collections.abc import Iterable
from pathlib import Path

from .cache import Cache, digest_of
from .debian import DISK_KERNEL_DEB, KERNEL_DEB, PACKAGES, ROOT_TAR
from .recipe import Recipe
from .tools import SOURCE_DATE_EPOCH, BuildError, remove_after, run

KERNEL = "vmlinux"
INITRD = "initrd"
DISK_KERNEL, DISK_INITRD = "vmlinuz", "initrd-disk"  # on the boot partition
INIT = Path(__file__).parent / "guest" / "initrd-init"
_LZ4_LEGACY = b"\x02\x21\x4c\x18"


def boot_layer(cache: Cache, recipe: Recipe, debian: Path, kernels: Path) -> tuple[str, Path]:
    """Key and directory with `vmlinux` and `initrd`."""
    # By content: a refreshed layer keeps its own key, and may hold another kernel.
    found = [kernels / KERNEL_DEB, kernels / DISK_KERNEL_DEB]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in found]
    packages = (debian / PACKAGES).read_bytes()
    modules = "\0".join([*recipe.modules, "", *recipe.disk_modules])
    key = digest_of(["boot", *digests, packages, modules, INIT.read_bytes(), Path(__file__).read_bytes()])

    def make(place: Path) -> None:
        busybox = _busybox(debian / ROOT_TAR)
        for package, target, initrd, wanted in (
            (KERNEL_DEB, KERNEL, INITRD, recipe.modules),
            (DISK_KERNEL_DEB, DISK_KERNEL, DISK_INITRD, (*recipe.modules, *recipe.disk_modules)),
        ):
            with remove_after(place / "package") as unpacked:
                run(["dpkg-deb", "-x", kernels / package, unpacked], "unpacking the kernel")
                (image,) = (unpacked / "boot").glob("vmlinuz-*")
                kernel = image.read_bytes()
                (place / target).write_bytes(extract_kernel(kernel) if target == KERNEL else kernel)
                (place / initrd).write_bytes(make_initrd(busybox, find_modules(unpacked, wanted)))

    return key, cache.layer("boot", key, make)


def extract_kernel(image: bytes) -> bytes:
    """The ELF kernel inside a bzImage, by its setup header (Linux, Documentation/x86/boot.rst)."""
    if image[0x202:0x206] != b"HdrS":
        raise BuildError("the kernel's package holds no x86 boot image")
    sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (sectors + 1) * 512 + offset
    payload = image[start : start + length]
    if not payload.startswith(_LZ4_LEGACY):
        raise BuildError("the kernel is compressed in a way other than lz4, which this builder does not know")
    # The last four bytes are the unpacked size, and no part of the lz4 stream.
    (size,) = struct.unpack("<I", payload[-4:])
    kernel = run(["lz4", "-d", "-c"], "unpacking the kernel", data=payload[:-4])
    if len(kernel) != size or not kernel.startswith(b"\x7fELF"):
        raise BuildError("the kernel did not unpack to an ELF file of the size that it names")
    return kernel


def find_modules(root: Path, names: Iterable[str]) -> list[tuple[str, bytes]]:
    """Name and content of each module, in the order asked for, each after those that it needs; not what is built in."""
    files = {path.name.removesuffix(".ko"): path for path in (root / "lib" / "modules").rglob("*.ko")}
    files |= {name.replace("-", "_"): path for name, path in files.items()}  # as modules name what they need
    built_in = {
        Path(line).name.removesuffix(".ko").replace("-", "_")
        for listing in (root / "lib" / "modules").glob("*/modules.builtin")
        for line in listing.read_text("utf-8").splitlines()
    }
    found: dict[Path, bytes] = {}

    def take(name: str) -> None:
        if name not in files and name.replace("-", "_") in built_in:
            return
        if name not in files:
            raise BuildError(f"the kernel's package has no module {name}", "mend the lists of modules in the recipe")
        path = files[name]
        if path not in found:
            content = path.read_bytes()
            for needed in _needs(content):
                take(needed)
            found[path] = content

    for name in names:
        take(name)
    return [(path.name.removesuffix(".ko"), content) for path, content in found.items()]


def _needs(module: bytes) -> list[str]:
    """What a module says that it needs: the list after `depends=` in its own description."""
    found = re.search(rb"\0depends=([\w,-]*)\0", module)
    return [name for name in found[1].decode("ascii").split(",") if name] if found else []


def _busybox(root_tar: Path) -> bytes:
    with tarfile.open(root_tar) as archive:
        for name in ("./usr/bin/busybox", "./bin/busybox"):
            try:
                member = archive.extractfile(name)
            except KeyError:
                continue
            if member is not None:
                return member.read()
    raise BuildError("the image has no busybox", "add busybox-static to `packages` in the recipe")


def make_initrd(busybox: bytes, modules: list[tuple[str, bytes]]) -> bytes:
    """A cpio archive, uncompressed: to unpack costs an emulated machine more than to read."""
    directory, program, data = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o755, stat.S_IFREG | 0o644
    entries = [(name, directory, b"") for name in ("bin", "dev", "modules", "root")]
    entries.append(("dev/console", stat.S_IFCHR | 0o600, b""))
    entries.append(("bin/busybox", program, busybox))
    entries.append(("init", program, INIT.read_bytes()))
    entries.append(("modules/order", data, "".join(f"{name}\n" for name, _ in modules).encode()))
    entries += [(f"modules/{name}.ko", data, content) for name, content in modules]
    return b"".join(_cpio(number, *entry) for number, entry in enumerate(entries, 1)) + _cpio(0, "TRAILER!!!", 0, b"")


def _cpio(inode: int, name: str, mode: int, content: bytes) -> bytes:
    """One member of a "newc" archive."""
    major, minor = (5, 1) if stat.S_ISCHR(mode) else (0, 0)
    numbers = [
        inode, mode, 0, 0, 1, SOURCE_DATE_EPOCH if inode else 0, len(content), 0, 0, major, minor, len(name) + 1, 0,
    ]  # fmt: skip
    header = b"070701" + b"".join(b"%08X" % number for number in numbers) + name.encode() + b"\0"
    return _padded(header) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
