"""Guests of a few instructions: an interpreted processor runs a boot sector, not Linux."""

from __future__ import annotations

import subprocess
from pathlib import Path

from host_agent.hypervisors.images import Image

GREETING = b"VMWRAPPER TEST GUEST\r\n"
_LOAD = 0x7C00

_BEGIN = bytes.fromhex(
    "fa 31c0 8ed8 8ed0 bc007c fb fc"  # cli; ax, ds, ss = 0; sp = 7c00; sti; cld
)
_PRINT = bytes.fromhex(
    "ac 84c0 7412 88c4"  # lodsb; test al,al; jz end; mov ah,al
    "bafd03 ec a820 74fb"  # until the serial port has room
    "88e0 baf803 ee ebe9"  # mov al,ah; out 3f8,al; the next one
)
_LETTERS = bytes.fromhex(
    "b361"  # mov bl,'a'
    "b90a00 f4 e2fd"  # ten times: hlt, until the timer's next tick of 55 ms
    "88d8 baf803 ee"  # bl to the serial port
    "fec3 80fb7b 75ed b361 ebe9"  # the next letter, and 'a' after 'z'
)
_POWER_OFF = bytes.fromhex(
    "ba0f04"  # mov dx,40f: the port with which VirtualBox's BIOS powers off
    "ac 84c0 7403 ee ebf8"  # the letters of the word there
    "f4 ebfd"
)


def _sector(after: bytes, more: bytes = b"") -> bytes:
    """Prints the greeting, then runs `after` with `more` at SI."""
    # mov si,text; print; after; text
    code_size = len(_BEGIN) + 3 + len(_PRINT) + len(after)
    text = _LOAD + code_size
    code = _BEGIN + b"\xbe" + text.to_bytes(2, "little") + _PRINT + after + GREETING + b"\0" + more
    return code.ljust(510, b"\0") + b"\x55\xaa"


LETTERS = _sector(_LETTERS)  # prints a letter every half second, for ever
POWERS_OFF = _sector(_POWER_OFF, b"Shutdown\0")  # powers itself off


def image(directory: Path, sector: bytes = LETTERS, name: str = "tiny") -> Image:
    """A guest image for VirtualBox with this boot sector."""
    directory.mkdir(exist_ok=True)
    raw, disk = directory / "disk.raw", directory / "disk.vdi"
    raw.write_bytes(sector.ljust(1 << 20, b"\0"))
    subprocess.run(
        ["VBoxManage", "convertfromraw", str(raw), str(disk), "--format", "VDI"],
        check=True,
        capture_output=True,
        timeout=60,
    )
    raw.unlink()
    return Image(name, directory, "1" * 64, "x86_64", disk, None, None, "", 64)


def network_image(directory: Path, command: str) -> Image:
    """A guest image that runs a command of iPXE: a FAT file system on a whole disk, with syslinux and iPXE on it."""
    directory.mkdir(exist_ok=True)
    raw, disk, menu = directory / "disk.raw", directory / "disk.vdi", directory / "syslinux.cfg"
    raw.write_bytes(b"\0" * (2 << 20))
    menu.write_text(f"DEFAULT ipxe\nLABEL ipxe\nKERNEL ipxe.krn\nAPPEND {command}\n")
    commands: list[list[str | Path]] = [
        ["mkfs.fat", raw],
        ["mcopy", "-i", raw, "/usr/lib/ipxe/ipxe.lkrn", "::ipxe.krn"],
        ["mcopy", "-i", raw, menu, "::"],
        ["syslinux", "--install", raw],
        ["VBoxManage", "convertfromraw", raw, disk, "--format", "VDI"],
    ]
    for argv in commands:
        subprocess.run(argv, check=True, capture_output=True, timeout=60)
    raw.unlink()
    return Image("network", directory, "2" * 64, "x86_64", disk, None, None, "", 64)
