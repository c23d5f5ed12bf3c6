"""`vmctl bundle`: a job and the frozen wrapper as a version of a BOINC application."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from common.errors import ConfigError

EPILOG = """\
The directory holds a job.xml and the files that go with it; vmctl new writes one, vmctl check looks at it.
Everything in it becomes a file of the application version, which the client checks and keeps, but for what
--input names: that comes with each workunit. What volunteers need then is in the bundle: no Python, no packages.
A job with virtual machines needs QEMU or VirtualBox on the volunteer's computer; the image is in the bundle.

examples:
  vmctl bundle ./worker --app worker --version 1.00 --project ~/project --input in --key keys/code_sign_private
  vmctl bundle ./worker --app worker --version 1.01 --project ~/project --input in --without virtualbox
  vmctl bundle --freeze-to ./frozen-windows     the wrapper of this platform alone, for --frozen elsewhere

docs/bundle.md goes from a directory with a program to a job on a test project.
"""


def add_parser(subparsers: Any) -> None:
    """Add `bundle` to vmctl's subcommands; it sets `func`."""
    parser = subparsers.add_parser(
        "bundle",
        help="make what a BOINC project installs: wrapper, job and image as an application version",
        description="Write apps/<app>/<version>/<platform>/ with version.xml, and the templates of a workunit.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, nargs="?", metavar="DIR", help="of the job: job.xml and its files")
    parser.add_argument("--app", metavar="NAME", help="of the application in the project (default: the directory's)")
    parser.add_argument("--version", dest="app_version", default="1.00", metavar="N.NN", help="default: %(default)s")
    parser.add_argument("--project", type=Path, default=Path(), metavar="DIR", help="the project's (default: here)")
    parser.add_argument("--platform", metavar="NAME", help="default: this computer's, such as x86_64-pc-linux-gnu")
    parser.add_argument("--plan-class", default="", metavar="NAME")
    parser.add_argument("--input", action="append", default=[], metavar="NAME", help="a file that each workunit brings")
    parser.add_argument(
        "--output", action="append", default=[], metavar="NAME", help="a result (default: all that job.xml names)"
    )
    parser.add_argument("--image", default="", metavar="NAME", help="for VMs of which job.xml names no image")
    parser.add_argument("--no-image", action="store_true", help="volunteers have the image already")
    parser.add_argument("--key", type=Path, metavar="FILE", help="the project's code_sign_private: sign all files")
    parser.add_argument("--without", action="append", default=[], metavar="PART", help="leave out virtualbox")
    parser.add_argument("--frozen", type=Path, metavar="DIR", help="a wrapper that was frozen on another platform")
    parser.add_argument("--freeze-to", type=Path, metavar="DIR", help="only freeze the wrapper, into a new directory")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="of what later bundles use again")
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    from host_agent.bundle.app_version import AppVersion, program_files, write
    from host_agent.bundle.content import sort_job
    from host_agent.bundle.freeze import this_platform
    from host_agent.bundle.signing import PrivateKey

    began = time.monotonic()
    if options.freeze_to is not None:
        return _freeze_to(options)
    if options.directory is None:
        raise ConfigError("which job?", "vmctl bundle DIR, with the directory of a job.xml")
    platform = options.platform or this_platform()
    version = AppVersion(
        options.app or options.directory.resolve().name, options.app_version, platform, options.plan_class
    )
    key = PrivateKey.load(options.key) if options.key else None
    content = sort_job(
        options.directory, options.input, options.output, image=options.image, with_image=not options.no_image
    )
    if options.frozen is None and platform != this_platform():
        raise ConfigError(
            f"the wrapper for {platform} cannot be frozen on this computer, which is {this_platform()}",
            "freeze it there with vmctl bundle --freeze-to DIR, and name that DIR here with --frozen",
        )
    place = options.project / version.directory
    if place.exists():  # before the minute that follows
        raise ConfigError(f"{place} exists already", "files of a BOINC project never change: take a higher --version")
    frozen = options.frozen or _frozen(options)
    for note in content.notes:
        print(f"note: {note}", file=sys.stderr)
    write(options.project, version, program_files(frozen, platform), content, key)
    size = sum(path.stat().st_size for path in place.iterdir())
    print(place)
    print(
        f"{len(list(place.iterdir()))} files, {size / 1e6:.1f} MB, in {time.monotonic() - began:.0f} s", file=sys.stderr
    )
    if key is None:
        print("nothing is signed: --key keys/code_sign_private, or bin/sign_executable of the project", file=sys.stderr)
    return 0


def _frozen(options: argparse.Namespace) -> Path:
    from host_agent.bundle.freeze import frozen_program
    from vm_images.cache import Cache, default_cache

    return frozen_program(Cache(options.cache or default_cache()), options.without)


def _freeze_to(options: argparse.Namespace) -> int:
    target: Path = options.freeze_to
    if target.exists():
        raise ConfigError(f"{target} exists already", "name a new directory")
    shutil.copytree(_frozen(options), target)
    print(target)
    return 0
