"""`vmctl copy SOURCE DESTINATION`, where one of both is VM:PATH."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path, PurePosixPath
from typing import Any

from common.errors import ConfigError

from .agents import find_vm

A_DAY = 86400.0
CHIRP_PORT = 9094  # Chirp's own


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "copy",
        help="copy files into a VM or out of it",
        description="Copy a file or a directory between this host and a VM. Paths in the VM are relative to the home "
        "of its agent. A destination that ends with / (or is a directory of this host) keeps the source's name. "
        "The content is checked by SHA-256, and no half-written file ever has its final name.",
        epilog="examples: vmctl copy input.dat worker:   |   vmctl copy worker:results ./results",
    )
    parser.add_argument("source", metavar="SOURCE", help="PATH or VM:PATH")
    parser.add_argument("destination", metavar="DESTINATION", help="PATH or VM:PATH")
    parser.add_argument(
        "--chirp",
        type=int,
        nargs="?",
        const=CHIRP_PORT,
        default=0,
        metavar="PORT",
        help="by cctools, with the chirp_server that the VM runs at PORT (%(const)s); default: by HTTP",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    source_vm, source = _split(options.source)
    destination_vm, destination = _split(options.destination)
    if bool(source_vm) == bool(destination_vm):
        raise ConfigError("exactly one of SOURCE and DESTINATION must be in a VM, written VM:PATH")
    found = find_vm(source_vm or destination_vm)
    more = {"chirp_port": options.chirp} if options.chirp else {}
    update = _Progress(quiet=options.quiet or not sys.stderr.isatty())
    if destination_vm:
        path = Path(source).absolute()
        if not path.exists():
            raise ConfigError(f"there is no {source}")
        if not destination or destination.endswith("/") or destination == ".":
            destination = str(PurePosixPath(destination or ".") / path.name)
        args = {"vm": found.vm["vm"], "source": str(path), "destination": destination, **more}
        done = found.client.call("put", args, update, deadline_s=A_DAY)
    else:
        target = Path(destination)
        if target.is_dir() or destination.endswith("/"):
            target = target / PurePosixPath(source).name
        args = {"vm": found.vm["vm"], "source": source, "destination": str(target.absolute()), **more}
        done = found.client.call("get", args, update, deadline_s=A_DAY)
    update.end()
    if not options.quiet:
        rate = done["bytes"] / max(done["seconds"], 1e-6) / 1e6
        print(f"{done['files']} files, {done['bytes']} bytes in {done['seconds']:.2f} s ({rate:.1f} MB/s), checked")
    return 0


def _split(place: str) -> tuple[str, str]:
    vm, colon, path = place.partition(":")
    if not colon or "/" in vm or (len(vm) == 1 and path.startswith("\\")):  # C:\… is a path of Windows
        return "", place
    return vm, path


class _Progress:
    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._next = 0.0
        self._shown = False

    def __call__(self, name: str, data: dict[str, Any]) -> None:
        now = time.monotonic()
        if self._quiet or name != "progress" or now < self._next:
            return
        self._next = now + 0.2
        self._shown = True
        share = 100 * data["bytes"] // max(1, data["total"])
        print(f"\r{data['bytes'] / 1e6:.1f} of {data['total'] / 1e6:.1f} MB  {share} %", end="", file=sys.stderr)

    def end(self) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr)
