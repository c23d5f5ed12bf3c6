"""`vmctl ping|pause|resume|stop VM`: small things with a running VM."""

from __future__ import annotations

import argparse
from typing import Any

from .agents import find_vm

COUNT = 4


def add_parser(subparsers: Any) -> None:
    for name, function, text in (
        ("ping", ping, "ask a VM's agent whether it is there"),
        ("pause", pause, "let a VM's processors stand still"),
        ("resume", resume, "let a paused VM go on"),
        ("stop", stop, "end a VM and remove everything of it"),
    ):
        parser = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        parser.add_argument("vm", metavar="VM", help="name or instance of the VM (vmctl vms)")
        parser.set_defaults(func=function)


def ping(options: argparse.Namespace) -> int:
    found = find_vm(options.vm)
    for _ in range(COUNT):
        answer = found.client.call("ping", {"vm": found.vm["vm"]})
        print(f"{options.vm} answers in {answer['round_trip_s'] * 1000:.1f} ms")
    return 0


def pause(options: argparse.Namespace) -> int:
    return _state(options, "pause_vm")


def resume(options: argparse.Namespace) -> int:
    return _state(options, "resume_vm")


def _state(options: argparse.Namespace, call: str) -> int:
    found = find_vm(options.vm)
    print(f"{options.vm} is {found.client.call(call, {'vm': found.vm['vm']})['state']}")
    return 0


def stop(options: argparse.Namespace) -> int:
    found = find_vm(options.vm)
    found.client.call("stop_vm", {"vm": found.vm["vm"]})
    print(f"{options.vm} has ended, nothing of it is left")
    return 0
