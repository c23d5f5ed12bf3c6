"""What makes the disk start by itself: a boot partition that BIOS and UEFI both read, and the table of partitions.

    sector 0        syslinux's first stage, which starts the active partition, and the partition table
    1 MiB           FAT: kernel, initrd, syslinux for BIOS, systemd-boot for UEFI
    ROOT_AT         ext4: the root file system

Written into a plain file by mtools: nothing is mounted.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from .tools import SOURCE_DATE_EPOCH, find_file, run

SECTOR = 512
BOOT_AT = 1 << 20
BOOT_BYTES = 63 << 20
ROOT_AT = BOOT_AT + BOOT_BYTES
_EFI_SYSTEM, _LINUX, _ACTIVE = 0xEF, 0x83, 0x80
_FAT_ID = "6d7661d1"  # any fixed value, as the file system's
_FIRST_STAGE = "/usr/lib/syslinux/mbr/mbr.bin"
_FIRST_STAGE_BYTES = 440
# Not GRUB: it keeps so much of 256 MB to itself that there is no room for Debian's larger kernel.
_UEFI_LOADER = "/usr/lib/systemd/boot/efi/systemd-bootx64.efi"
_DATES = {"MTOOLS_SKIP_CHECK": "1"}


def boot_partition(place: Path, kernel: Path, initrd: Path, cmdline: str) -> Path:
    """Write the FAT file system to a file in `place` and return its path."""
    fat = place / "boot.fat"
    what = "making the boot partition"
    loader, settings, entry = place / "BOOTX64.EFI", place / "loader.conf", place / "entry.conf"
    loader.write_bytes(find_file(_UEFI_LOADER).read_bytes())
    settings.write_text("timeout 0\n", "utf-8")
    entry.write_text(f"title Linux\nlinux /vmlinuz\ninitrd /initrd\noptions {cmdline}\n", "utf-8")
    syslinux = place / "syslinux.cfg"
    syslinux.write_text(
        f"DEFAULT linux\nPROMPT 0\nTIMEOUT 0\nLABEL linux\n  LINUX /vmlinuz\n  INITRD /initrd\n  APPEND {cmdline}\n",
        "utf-8",
    )
    with fat.open("wb") as file:
        file.truncate(BOOT_BYTES)
    run(["mkfs.fat", "-F", "32", "-s", "1", "-h", str(BOOT_AT // SECTOR), "-i", _FAT_ID, "--invariant", fat], what)
    run(["mmd", "-i", fat, "::/EFI", "::/EFI/BOOT", "::/loader", "::/loader/entries"], what, env=_DATES)
    targets = {
        kernel: "vmlinuz",
        initrd: "initrd",
        syslinux: "syslinux.cfg",
        loader: "EFI/BOOT/BOOTX64.EFI",
        settings: "loader/loader.conf",
        entry: "loader/entries/linux.conf",
    }
    for source, target in targets.items():
        os.utime(source, (SOURCE_DATE_EPOCH, SOURCE_DATE_EPOCH))
        run(["mcopy", "-m", "-i", fat, source, f"::/{target}"], what, env=_DATES)
    run(["syslinux", "--install", fat], "installing the BIOS boot loader", env=_DATES)
    for path in (loader, settings, entry, syslinux):
        path.unlink()
    return fat


def write_table(disk: Path, size: int) -> None:
    """The first sector of a disk of `size` bytes."""
    stage = find_file(_FIRST_STAGE).read_bytes()[:_FIRST_STAGE_BYTES].ljust(_FIRST_STAGE_BYTES, b"\0")
    table = _entry(_ACTIVE, _EFI_SYSTEM, BOOT_AT, BOOT_BYTES) + _entry(0, _LINUX, ROOT_AT, size - ROOT_AT)
    sector = stage + bytes.fromhex(_FAT_ID) + b"\0\0" + table + bytes(32) + b"\x55\xaa"
    with disk.open("r+b") as file:
        file.write(sector)


def _entry(flag: int, kind: int, start: int, size: int) -> bytes:
    """One partition; the old cylinder numbers say "too large", so that all go by the sectors."""
    far = b"\xfe\xff\xff"
    return bytes([flag]) + far + bytes([kind]) + far + struct.pack("<II", start // SECTOR, size // SECTOR)


def copy_into(disk: Path, part: Path, offset: int) -> None:
    """Write a file's data to its place, and leave out what is zero."""
    with part.open("rb") as source, disk.open("r+b") as target:
        while block := source.read(1 << 16):
            if any(block):
                target.seek(offset)
                target.write(block)
            offset += len(block)
