"""`vmctl vms`: every VM of this user, and how it does."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .agents import every_vm

COLUMNS = ("VM", "STATE", "AGENT", "IMAGE", "MEMORY", "CPU", "COMMANDS", "SEEN", "INSTANCE")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "vms",
        help="list the VMs and their states",
        description="List every VM of every host agent of this user: its state, whether its agent answers, "
        "and what it uses.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line, as docs/control.md describes it")
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    found = [each.vm for each in every_vm()]
    if options.json:
        for vm in found:
            print(json.dumps(vm))
        return 0
    if not found:
        print("no VM runs here")
        return 0
    rows = [COLUMNS, *(_row(vm) for vm in found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _row(vm: dict[str, Any]) -> tuple[str, ...]:
    seen = vm["last_seen_s"]
    return (
        vm["vm"],
        vm["state"],
        vm["agent"],
        vm["image"],
        f"{vm['memory_mb']} MB",
        f"{vm['cpu_s']:.1f} s",
        str(vm["commands"]),
        "never" if seen is None else f"{seen:.0f} s ago",
        vm["instance"],
    )
