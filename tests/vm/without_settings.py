"""QEMU as somebody starts it by hand: `without_settings.py QEMU SOCKET|cmdline OPTIONS`, in the place of the driver's.

Takes from the driver's command line what only our driver gives a guest, the settings in `fw_cfg` and the line to its
host. "cmdline": the settings are on the kernel's command line instead. A socket: they go there, with a port that
listens where the guest's DHCP server says that the gateway is, in another network than the usual one. The host's
loopback, which the guest's gateway leads to, is one of its own for this (`unshare --net`): the port's number is fixed.
"""

from __future__ import annotations

import base64
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

from guest_agent.discovery import CMDLINE_KEY, GATEWAY_PORT

SIOCSIFFLAGS, IFF_UP = 0x8914, 1  # linux/sockios.h, linux/if.h


def main(qemu: str, how: str, *options: str) -> None:
    argv = list(options)
    if "-fw_cfg" in argv:  # else the driver only asks what QEMU can do
        settings = take_settings(argv)
        if how == "cmdline":
            word = base64.urlsafe_b64encode(settings).decode().rstrip("=")
            argv[argv.index("-append") + 1] += f" {CMDLINE_KEY}{word}"
        else:
            hand_over(settings, how)
            at = argv.index("-netdev") + 1
            argv[at] = argv[at].replace("restrict=on", "net=192.168.76.0/24").replace("10.0.2.", "192.168.76.")
    os.execv(qemu, [qemu, *argv])  # noqa: S606


def take_settings(argv: list[str]) -> bytes:
    """Out of the command line, as the line to the host is."""
    at = argv.index("-fw_cfg")
    settings = Path(argv[at + 1].partition("file=")[2]).read_bytes()
    del argv[at : at + 2]
    at = next(place for place, word in enumerate(argv) if word.startswith("virtserialport,"))
    del argv[at - 1 : at + 1]
    return settings


def hand_over(settings: bytes, place: str) -> None:
    """To the test that waits there: them, and the port at the gateway."""
    with socket.socket() as one:
        fcntl.ioctl(one, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))
    with socket.create_server(("127.0.0.1", GATEWAY_PORT)) as gate, socket.socket(socket.AF_UNIX) as test:
        test.connect(place)
        socket.send_fds(test, [settings.replace(b"10.0.2.", b"192.168.76.")], [gate.fileno()])


if __name__ == "__main__":
    main(*sys.argv[1:])
