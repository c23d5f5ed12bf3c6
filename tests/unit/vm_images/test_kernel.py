from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from vm_images.kernel import extract_kernel, find_modules, make_initrd
from vm_images.tools import BuildError


def boot_image(payload: bytes) -> bytes:
    """A bzImage with nothing in it but its header and a payload."""
    image = bytearray(5 * 512 + 64)
    image[0x1F1] = 4
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", image, 0x248, 64, len(payload))
    return bytes(image) + payload


def test_kernel_is_unpacked() -> None:
    kernel = b"\x7fELF" + bytes(range(256)) * 64
    packed = subprocess.run(["lz4", "-l", "-c"], input=kernel, capture_output=True, check=True).stdout
    assert extract_kernel(boot_image(packed + struct.pack("<I", len(kernel)))) == kernel
    with pytest.raises(BuildError, match="size"):
        extract_kernel(boot_image(packed + struct.pack("<I", 1)))


def test_what_is_no_kernel() -> None:
    with pytest.raises(BuildError, match="no x86 boot image"):
        extract_kernel(bytes(4096))
    with pytest.raises(BuildError, match="other than lz4"):
        extract_kernel(boot_image(b"\x1f\x8b" + bytes(64)))


def test_modules_keep_the_order_of_the_recipe(tmp_path: Path) -> None:
    place = tmp_path / "lib" / "modules" / "6.1" / "kernel"
    place.mkdir(parents=True)
    for name in ("a", "b-c"):
        (place / f"{name}.ko").write_text(name)
    assert find_modules(tmp_path, ["b-c", "a"]) == [("b-c", b"b-c"), ("a", b"a")]
    with pytest.raises(BuildError, match="no module d"):
        find_modules(tmp_path, ["a", "d"])


def test_what_the_kernel_has_built_in_is_no_module(tmp_path: Path) -> None:
    place = tmp_path / "lib" / "modules" / "6.1"
    place.mkdir(parents=True)
    (place / "a.ko").write_bytes(b"\0depends=c_d,e\0")
    (place / "modules.builtin").write_text("kernel/fs/c-d.ko\nkernel/e.ko\n")
    assert [name for name, _ in find_modules(tmp_path, ["e", "a"])] == ["a"]


def test_initrd_can_be_unpacked() -> None:
    archive = make_initrd(b"busybox", [("virtio", b"module")])
    listed = subprocess.run(["cpio", "-it", "--quiet"], input=archive, capture_output=True, check=True)
    names = listed.stdout.decode().split()
    assert {"init", "bin/busybox", "modules/virtio.ko", "modules/order", "dev/console"} <= set(names)


def test_initrd_is_the_same_each_time() -> None:
    assert make_initrd(b"b", [("m", b"1")]) == make_initrd(b"b", [("m", b"1")])
    assert len(make_initrd(b"b", [])) % 4 == 0
