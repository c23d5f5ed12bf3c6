"""`vmwrapper-host-agent` whose QEMU guests have qemu-guest-agent's line besides, at qga.sock, and ports forwarded."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from host_agent import main
from host_agent.hypervisors import qemu_options, qemu_templates, qemu_vm

QGA_SOCKET = "qga.sock"
QGA_PORT = "org.qemu.guest_agent.0"


FORWARDS = "VMWRAPPER_BENCH_FORWARDS"  # HOSTPORT:GUESTPORT,…: ports of the loopback that lead to the guest's


def command_line(spec: Any, accelerator: tuple[str, ...], disk: Path, place: Path, *more: Any) -> list[str]:
    """As ever, and that line."""
    argv = [word.replace("max_ports=2", "max_ports=3") for word in plain(spec, accelerator, disk, place, *more)]
    argv += ["-chardev", f"socket,id=qga,path={place / QGA_SOCKET},server=on,wait=off"]
    return [*argv, "-device", f"virtserialport,chardev=qga,name={QGA_PORT}"]


def forwarding(*arguments: Any) -> list[str]:
    """For the VM itself; a template needs no way in."""
    pairs = [pair.split(":") for pair in os.environ[FORWARDS].split(",")]
    forwards = "".join(f",hostfwd=tcp:127.0.0.1:{ours}-:{theirs}" for ours, theirs in pairs)
    return [f"{word}{forwards}" if word.startswith("user,id=") else word for word in command_line(*arguments)]


plain = qemu_options.command_line

if __name__ == "__main__":
    setattr(qemu_vm, "command_line", forwarding)  # noqa: B010  (they import it by name)
    setattr(qemu_templates, "command_line", command_line)  # noqa: B010
    sys.exit(main.main())
