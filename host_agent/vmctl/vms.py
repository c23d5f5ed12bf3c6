"""`vmctl vms`: every VM of this user, and how it does; with VirtualBox, also the machines that are not ours."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable
from typing import Any

from host_agent.hypervisors.choice import VARIABLE

from .agents import every_vm

VIRTUALBOX_DEADLINE = 30.0  # seconds for VirtualBox's service to start and answer

COLUMNS = ("VM", "STATE", "AGENT", "IMAGE", "MEMORY", "CPU", "COMMANDS", "SEEN", "INSTANCE")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "vms",
        help="list the VMs and their states",
        description="List every VM of every host agent of this user: its state, whether its agent answers, "
        "and what it uses. Where VirtualBox is installed, its other machines follow: those that other programs "
        "made, and those that a dead host agent left (vmctl sweep removes them).",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line, as docs/control.md describes it")
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    found = [each.vm for each in every_vm()]
    found += others_in_virtualbox({vm["instance"] for vm in found})
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


def others_in_virtualbox(known: Iterable[str]) -> list[dict[str, Any]]:
    """VirtualBox's machines that no host agent has, in the same form; `agent` says whose they are."""
    chosen = os.environ.get(VARIABLE) == "virtualbox"
    if not chosen and shutil.which("VBoxManage") is None:
        return []
    from host_agent.hypervisors.virtualbox.one_call import one_call
    from host_agent.hypervisors.virtualbox.pyvbox import BoxError

    try:
        machines = one_call("machines", VIRTUALBOX_DEADLINE)
    except BoxError as error:
        if chosen:
            print(f"VirtualBox's machines cannot be listed: {error}", file=sys.stderr)
        return []
    return [_of_virtualbox(machine) for machine in machines if machine["instance"] not in known]


def _of_virtualbox(machine: dict[str, Any]) -> dict[str, Any]:
    return {
        "vm": machine["name"] or machine["id"],
        "instance": machine["instance"] or machine["id"],
        "state": machine["state"].lower(),
        "agent": "left behind" if machine["instance"] else "not ours",
        "hypervisor": "virtualbox",
        "image": "-",
        "memory_mb": machine["memory_mb"],
        "cpus": machine["cpus"],
        "pid": machine["pid"],
        "cpu_s": 0.0,
        "agent_version": "",
        "last_seen_s": None,
        "commands": 0,
        "reason": "",
    }


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
