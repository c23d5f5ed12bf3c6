"""A real VirtualBox without its kernel driver: `python -m tests.virtualbox.chroot COMMAND…` runs a command beside it.

Debian's VirtualBox is in `sid` only, so it is installed into a directory tree of its own, kept in the cache of the
image builder (`VMWRAPPER_CACHE`, ~600 MB) for as long as this file, `stand-in.sh` and the lock file stay the same.
`enter.sh` mounts it in name spaces of its own: root is not needed where user name spaces are allowed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from common.errors import VMwrapperError
from vm_images.cache import Cache, default_cache, digest_of
from vm_images.sources import debian_sources
from vm_images.tools import as_root, find_tool, run

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
LOCK = CHECKOUT / "lock" / "virtualbox.txt"
PYTHON = "3.14"  # sid's
RELEASE = "sid"


def root(cache: Cache) -> Path:
    """Directory tree with VirtualBox in it."""
    sources = [f"{line} contrib" for line in debian_sources(RELEASE)]
    hook = HERE / "stand-in.sh"
    key = digest_of(["virtualbox", "\n".join(sources), hook.read_bytes(), Path(__file__).read_bytes()])

    def make(place: Path) -> None:
        options = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale")]
        archive, tree = place / "root.tar", place / "root"
        run(
            [
                "mmdebstrap",
                "--mode=auto",
                "--variant=essential",
                "--format=tar",
                # The archive's list of sid may be older than it says it stays valid.
                '--aptopt=Acquire::Check-Valid-Until "false"',
                *options,
                f"--essential-hook={hook.read_text('utf-8')}",
                # Besides: what the guest that tries the network boots from, and a network for it.
                "--include=python3,virtualbox,ipxe,syslinux,mtools,dosfstools,iproute2",
                '--customize-hook=mkdir "$1/checkout" "$1/libraries"',
                RELEASE,
                archive,
                "-",
            ],
            "installing VirtualBox into a directory tree",
            data="".join(f"{line}\n" for line in sources).encode(),
        )
        tree.mkdir()
        unpack: list[str | Path] = [*as_root(), "tar", "--extract", "--file", archive, "--directory", tree]
        run([*unpack, "--exclude=./dev/*", "--numeric-owner"], "unpacking the directory tree")
        archive.unlink()

    return cache.layer("virtualbox", key, make) / "root"


def libraries(cache: Cache) -> Path:
    """What the tests import, from the hashed lock file, for that tree's Python."""
    key = digest_of(["virtualbox-libraries", PYTHON, LOCK.read_bytes(), Path(__file__).read_bytes()])

    def make(place: Path) -> None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
        pip += ["--no-compile", "--no-deps", "--require-hashes", "--only-binary=:all:", f"--python-version={PYTHON}"]
        pip += [f"--platform={name}_x86_64" for name in ("manylinux2014", "manylinux_2_28", "manylinux_2_34")]
        pip += ["--implementation=cp", f"--abi=cp{PYTHON.replace('.', '')}", "--abi=abi3", "--abi=none"]
        settings = {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "SSL_", "REQUESTS_"))}
        target, lock = f"--target={place}", f"--requirement={LOCK}"
        run([*pip, target, lock], "fetching the libraries of the tests", env=settings)

    return cache.layer("virtualbox-libraries", key, make)


def main(command: list[str]) -> NoReturn:
    cache = Cache(default_cache())
    try:
        tree = root(cache)
        where = libraries(cache)
        unshare = [find_tool("unshare"), *(["--user", "--map-root-user", "--map-auto"] if os.geteuid() else [])]
    except VMwrapperError as error:
        sys.exit(f"VirtualBox cannot be set up for the tests: {error.explain()}")
    unshare += ["--mount", "--net", "--pid", "--fork", "--kill-child", "--"]
    words = [*unshare, "sh", HERE / "enter.sh", tree, where, CHECKOUT, *command]
    # In this process's place: whoever ends it, ends everything.
    os.execv(unshare[0], [str(word) for word in words])  # noqa: S606 - a list of words


if __name__ == "__main__":
    main(sys.argv[1:])
