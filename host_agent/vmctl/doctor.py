"""`vmctl doctor`: is everything here that VMs need, and what to do where it is not?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from host_agent.hypervisors.choice import add_option, make_hypervisor

if TYPE_CHECKING:
    from host_agent.hypervisors.base import Requirement

DEADLINE = 120.0  # seconds for all looks together; a probe boot is the slowest of them


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="look for what is missing on this host",
        description="Look at every requirement for running VMs here: found or not, and what to do.",
        epilog="exit code 0: VMs can run here; 1: something that they cannot do without is missing.",
    )
    add_option(parser)
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    requirements = [*_python(), _images(), *_host(options.hypervisor)]
    width = max(len(each.name) for each in requirements)
    for each in requirements:
        mark = "ok  " if each.met else "FAIL" if each.fatal else "note"
        print(f"{mark}  {each.name.ljust(width)}  {each.found}")
        if not each.met and each.remedy:
            print(f"      {' ' * width}  → {each.remedy}")
    missing = [each for each in requirements if not each.met and each.fatal]
    print(f"{len(missing)} of {len(requirements)} requirements are not met" if missing else "VMs can run here")
    return 1 if missing else 0


def _python() -> list[Requirement]:
    from importlib.metadata import PackageNotFoundError, version

    from host_agent.hypervisors.base import Requirement

    found = [Requirement("Python", sys.version_info >= (3, 11), sys.version.split()[0], "use Python 3.11 or newer")]
    for package in ("twisted", "stomp.py", "lxml", "psutil"):
        try:
            found.append(Requirement(package, True, version(package)))
        except PackageNotFoundError:
            found.append(Requirement(package, False, "not installed", f"pip install {package}"))
    return found


def _images() -> Requirement:
    from host_agent.hypervisors.base import Requirement
    from host_agent.hypervisors.images import image_store, list_images

    names = [image.name for image in list_images(image_store())]
    found = f"{', '.join(names) or 'none'} in {image_store()}"
    return Requirement("guest images", bool(names), found, "vmctl image build", fatal=False)


def _host(name: str) -> list[Requirement]:
    from twisted.internet import reactor
    from twisted.internet.defer import Deferred
    from twisted.python.failure import Failure

    from host_agent.doctor import look
    from host_agent.hypervisors.base import Remembering, Requirement

    found: list[Requirement] = []

    def looked(result: list[Requirement] | Failure) -> None:
        if isinstance(result, Failure):
            found.append(Requirement(name, False, result.getErrorMessage()))
        else:
            found.extend(result)
        reactor.stop()

    hypervisor = make_hypervisor(name, reactor)
    if isinstance(hypervisor, Remembering):  # who asks wants to know what is so now, and may just have put it right
        hypervisor.look_anew()

    def begin() -> None:
        looking = Deferred.fromCoroutine(look(hypervisor, Path.cwd()))
        looking.addTimeout(DEADLINE, reactor).addBoth(looked)

    reactor.callWhenRunning(begin)
    reactor.run()
    return found
