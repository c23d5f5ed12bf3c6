"""Where a guest finds its settings: the first of these places that has some (`docs/images.md`, "Discovery").

    1  config drive            a CD or disk with an ISO 9660 volume and `config.json` in its root
    2  QEMU's fw_cfg           the item opt/vmwrapper/config
    3  VirtualBox's properties /VMwrapper/Config/0, /1, …: base64 in pieces, because a property is short
    4  kernel command line     vmwrapper.config=<base64url>
    5  DHCP gateway            http://GATEWAY:61680/vmwrapper/config.json

All of it may be asked again at any time: a machine that was restored elsewhere finds what is there now. Runs as root,
before anything heavy is imported; only what costs little is imported here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Optional

MOST = 64 * 1024  # bytes of settings
FW_CFG = "/sys/firmware/qemu_fw_cfg/by_name/opt/vmwrapper/config/raw"
BLOCK_DEVICES = "/sys/block"
DRIVES = ("sr", "vd", "sd", "hd", "xvd")
MOST_DRIVES = 32
CONFIG_NAMES = ("config.json", "config.jso")  # the second: ISO 9660 level 1
VBOX_GUEST = "/dev/vboxguest"
VBOX_CONTROL = "VBoxControl"
PROPERTY = "/VMwrapper/Config"
MOST_PROPERTIES = 512
CMDLINE = "/proc/cmdline"
CMDLINE_KEY = "vmwrapper.config="
ROUTES = "/proc/net/route"
GATEWAY_PORT = 61680
GATEWAY_PATH = "/vmwrapper/config.json"
GATEWAY_TIMEOUT = 2.0  # seconds

Source = Callable[[], Optional[bytes]]


def discover(*, gateway: bool = True) -> tuple[str, bytes] | None:
    """Name of the place and the settings in it; None when there are none anywhere.

    Without `gateway` the network is not asked: a machine that has a line to its host is told through that.
    """
    for name, look in SOURCES:
        if name == "gateway" and not gateway:
            continue
        found = look()
        if found is not None and usable(found):
            return name, found
    return None


def usable(content: bytes) -> bool:
    """Whether these may be a guest's settings; the agent looks at them more closely."""
    try:
        return len(content) <= MOST and isinstance(json.loads(content.strip(b"\0 \t\r\n")), dict)
    except ValueError:
        return False


def config_drive() -> bytes | None:
    from .iso9660 import read_file

    try:
        names = sorted(name for name in os.listdir(BLOCK_DEVICES) if name.startswith(DRIVES))  # noqa: PTH208
    except OSError:
        return None
    for name in names[:MOST_DRIVES]:
        found = read_file(f"/dev/{name}", CONFIG_NAMES, MOST)
        if found is not None and usable(found):
            return found
    return None


def fw_cfg() -> bytes | None:
    return _read(FW_CFG)


def guest_property() -> bytes | None:
    if not os.path.exists(VBOX_GUEST):  # noqa: PTH110
        return None
    import base64
    import subprocess

    pieces: list[str] = []
    while len(pieces) < MOST_PROPERTIES:
        command = [VBOX_CONTROL, "--nologo", "guestproperty", "get", f"{PROPERTY}/{len(pieces)}"]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)
        except (OSError, subprocess.SubprocessError):
            return None
        _, said, value = done.stdout.decode("ascii", "replace").partition("Value: ")
        if done.returncode or not said:
            break
        pieces.append(value.strip())
    try:
        return base64.b64decode("".join(pieces), validate=True) or None
    except ValueError:
        return None


def command_line() -> bytes | None:
    for word in (_read(CMDLINE) or b"").decode("ascii", "replace").split():
        if word.startswith(CMDLINE_KEY):
            import base64

            value = word[len(CMDLINE_KEY) :]
            try:
                return base64.urlsafe_b64decode(value + "=" * (-len(value) % 4))
            except ValueError:
                return None
    return None


def gateway() -> bytes | None:
    address = _gateway_address()
    if address is None:
        return None
    import socket

    try:
        with socket.create_connection((address, GATEWAY_PORT), GATEWAY_TIMEOUT) as connection:
            connection.sendall(f"GET {GATEWAY_PATH} HTTP/1.0\r\nHost: {address}\r\n\r\n".encode("ascii"))
            answer = b""
            while len(answer) <= MOST + 8192:
                data = connection.recv(65536)
                if not data:
                    break
                answer += data
    except OSError:
        return None
    head, _, body = answer.partition(b"\r\n\r\n")
    return body if head.split(b" ")[1:2] == [b"200"] else None


def _gateway_address() -> str | None:
    """Of the default route, as DHCP gave it."""
    for line in (_read(ROUTES) or b"").decode("ascii", "replace").splitlines()[1:]:
        fields = line.split("\t")
        if len(fields) > 3 and fields[1] == "00000000" and int(fields[3], 16) & 2:
            return ".".join(str(byte) for byte in reversed(bytes.fromhex(fields[2])))
    return None


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:  # noqa: PTH123  (pathlib costs part of a second in an emulated guest)
            return file.read(MOST + 1)
    except OSError:
        return None


SOURCES: tuple[tuple[str, Source], ...] = (
    ("config drive", config_drive),
    ("fw_cfg", fw_cfg),
    ("guest property", guest_property),
    ("kernel command line", command_line),
    ("gateway", gateway),
)
