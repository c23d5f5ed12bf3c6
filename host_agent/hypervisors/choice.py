"""Which hypervisor drives this host's VMs: named on the command line, or by `VMWRAPPER_HYPERVISOR`."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError

if TYPE_CHECKING:
    from .base import Hypervisor

HYPERVISORS = ("qemu", "virtualbox", "process")
VARIABLE = "VMWRAPPER_HYPERVISOR"


def add_option(parser: argparse.ArgumentParser) -> None:
    """`--hypervisor`."""
    parser.add_argument(
        "--hypervisor",
        choices=HYPERVISORS,
        default=os.environ.get(VARIABLE) or HYPERVISORS[0],
        help=f"default: {HYPERVISORS[0]}, or what {VARIABLE} says; process is a guest agent without a VM, for trials",
    )


def make_hypervisor(name: str, reactor: Any) -> Hypervisor:
    """The driver of that name."""
    if name == "virtualbox":
        try:
            from .virtualbox.driver import VirtualBoxHypervisor
        except ModuleNotFoundError:
            raise ConfigError(
                "this vmwrapper was made without VirtualBox", f"{VARIABLE}=qemu, or a bundle with that part"
            ) from None
        return VirtualBoxHypervisor(reactor)
    if name == "qemu":
        from .qemu import QemuHypervisor

        return QemuHypervisor(reactor)
    if name == "process":
        from .process import ProcessHypervisor

        return ProcessHypervisor(reactor)
    # Choices of a command line are checked when it is read, a default is not.
    raise ConfigError(f"{VARIABLE} is {name!r}", f"set it to one of: {', '.join(HYPERVISORS)}")
