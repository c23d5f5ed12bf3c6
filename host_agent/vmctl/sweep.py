"""`vmctl sweep`: remove what crashed host agents left on this host."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "sweep",
        help="remove what a crash left behind",
        description="Remove the VMs, disks and sockets of host agents that are provably dead; nothing else. "
        "Every host agent does the same when it starts.",
    )
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    from host_agent.ledger import sweep

    removed = sweep()
    for sentence in removed:
        print(sentence)
    if not removed:
        print("nothing was left behind")
    return 0
