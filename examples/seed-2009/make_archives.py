#!/usr/bin/env python3
"""Make the three archives of the 2009 example from what is real today, into a directory (a slot).

apache-activemq-5.2.0.tar            Debian's ActiveMQ with a configuration of ours, in the folder of 2009
cctools-2_5_2-1686-linux-2.6.tar     Debian's cctools (the name is as the slides print it)
boincvm.tar                          our host agent as boincvm/HostMain.py, with every library that it needs
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from host_agent.broker.setup.init import set_up  # noqa: E402
from host_agent.broker.setup.plan import Plan, host_logins  # noqa: E402

HOST_LOGIN = "boincvm"
GUESTS = 4
ACTIVEMQ = Path("/usr/share/activemq")
CCTOOLS = ("chirp", "chirp_get", "chirp_put", "chirp_server")
OWN = ("common", "guest_agent", "host_agent", "vm_images")
REQUIRED = ("attrs", "psutil", "stomp.py", "twisted")
UNUSED = shutil.ignore_patterns("__pycache__", "test", "tests", "*.pyi", "*.c", "*.h", "newsfragments")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slot", type=Path)
    parser.add_argument("--port", type=int, default=61613, help="the broker's (%(default)s, that of 2009)")
    parser.add_argument("--xmlrpc-port", type=int, default=0, help="serve XML-RPC there (2009: 8080); default: no")
    options = parser.parse_args()
    make_archives(options.slot, options.port, options.xmlrpc_port)


def make_archives(slot: Path, port: int, xmlrpc_port: int = 0) -> None:
    with tempfile.TemporaryDirectory(prefix="seed-2009-") as name:
        work = Path(name)
        plan = set_up("activemq", work / "plan", [host_logins(HOST_LOGIN, GUESTS)], port=port, names=["localhost"])
        pack(slot / "apache-activemq-5.2.0.tar", activemq(work, plan))
        pack(slot / "cctools-2_5_2-1686-linux-2.6.tar", cctools(work))
        pack(slot / "boincvm.tar", boincvm(work, plan, xmlrpc_port))


def activemq(work: Path, plan: Plan) -> Path:
    folder = work / "apache-activemq-5.2.0"
    if not ACTIVEMQ.is_dir():
        sys.exit(f"there is no {ACTIVEMQ}; apt-get install --no-install-recommends activemq")
    shutil.copytree(ACTIVEMQ, folder, ignore=dangling)  # follows Debian's links: the archive brings everything but Java
    for name in ("conf", "data", "tmp"):
        (folder / name).mkdir()
    for name in ("activemq.xml", "log4j.properties"):
        shutil.copy2(plan.directory / name, folder / "conf" / name)
    shutil.copytree(plan.directory / "lib" / "optional", folder / "lib" / "optional", dirs_exist_ok=True)
    shutil.copyfile(HERE / "activemq", folder / "bin" / "activemq")
    (folder / "bin" / "activemq").chmod(0o755)
    return folder


def dangling(directory: str, names: list[str]) -> list[str]:
    """Links to what other packages would bring, and the broker does without."""
    return [name for name in names if not (Path(directory) / name).exists()]


def cctools(work: Path) -> Path:
    programs = work / "cctools-2_5_2-i686-linux-2.6" / "bin"
    programs.mkdir(parents=True)
    for name in CCTOOLS:
        found = shutil.which(name)
        if found is None:
            sys.exit(f"there is no {name}; apt-get install --no-install-recommends coop-computing-tools")
        shutil.copy2(found, programs / name)
    return programs.parent


def boincvm(work: Path, plan: Plan, xmlrpc_port: int) -> Path:
    folder = work / "boincvm"
    library = folder / "lib"
    library.mkdir(parents=True)
    for name in OWN:
        shutil.copytree(ROOT / name, library / name, ignore=UNUSED)
    for distribution in sorted(needed(REQUIRED)):
        copy_distribution(distribution, library)
    shutil.copyfile(HERE / "HostMain.py", folder / "HostMain.py")
    host = plan.hosts[0]
    text = (HERE / "HostConfig.cfg.in").read_text("utf-8")
    values = {
        "port": str(plan.port),
        "username": host.host.name,
        "password": host.host.passcode,
        "xmlrpc_port": str(xmlrpc_port or ""),
        "guests": "\n".join(f"{guest.name}={guest.passcode}" for guest in host.guests),
    }
    config = folder / "HostConfig.cfg"
    config.touch(mode=0o600)
    config.write_text(re.sub(r"\{(\w+)\}", lambda match: values[match[1]], text), "utf-8")
    return folder


def needed(names: tuple[str, ...]) -> set[str]:
    """Distributions that these need, and they themselves, of those that are installed here."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another system or an older Python
        found.add(name)
        waiting += [
            match[0] for line in requires if "extra ==" not in line and (match := re.match(r"[A-Za-z0-9._-]+", line))
        ]
    return found


def copy_distribution(name: str, library: Path) -> None:
    for file in importlib.metadata.files(name) or []:
        if (
            ".." in file.parts
            or {"__pycache__", "test", "tests"} & set(file.parts)
            or file.suffix in (".c", ".h", ".pyi")
        ):
            continue
        target = library / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(str(file.locate()), target)


def pack(archive: Path, folder: Path) -> None:
    """Passcodes are in there: for its owner alone."""
    handle = os.open(archive, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        tar.add(folder, folder.name, recursive=False)
        for path in _below(folder):
            tar.add(path, f"{folder.name}/{path.relative_to(folder)}", recursive=False)


def _below(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.rglob("*"))


if __name__ == "__main__":
    main()
