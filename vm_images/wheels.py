"""The guest agent's libraries: the pinned wheels of the guest's lock file, without what no agent uses."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from .cache import Cache, digest_of
from .tools import BuildError, find_tool, remove_tree, run

_HERE = Path(__file__).parent
_LOCKS = (_HERE, _HERE.parent / "lock")
# Parts of Twisted that neither the agent nor the parts that it uses import.
_UNUSED_TWISTED = (
    *("conch", "words", "mail", "names", "trial", "newsfragments", "pair", "_threads/test"),
    *("application", "cred", "enterprise", "plugins", "positioning", "runner", "scripts", "spread", "tap", "web"),
    *("internet/iocpreactor",),
)
_UNUSED = ("automat", "docopt", "docopt.py", "hyperlink", "idna", "packaging", "bin")
_UNUSED_SUFFIXES = (".c", ".h", ".pyi", ".rst", ".exe")


def lock_file(python: str) -> Path:
    """The pinned and hashed list: beside this module when installed, in `lock/` in a checkout."""
    name = "guest-3.9.txt" if python == "3.9" else "guest.txt"
    for place in _LOCKS:
        if (place / name).is_file():
            return place / name
    raise BuildError(f"the guest agent's lock file {name} is neither in {_LOCKS[0]} nor in {_LOCKS[1]}")


def wheels_layer(cache: Cache, python: str, architecture: str) -> tuple[str, Path]:
    """Key and directory of the libraries for a Python, ready to be put on the guest's module path."""
    lock = lock_file(python)
    key = digest_of(["wheels", python, architecture, lock.read_bytes(), Path(__file__).read_bytes()])

    def make(place: Path) -> None:
        platform = f"manylinux2014_{architecture}"
        install_wheels(place, lock, "fetching the guest agent's libraries", python=python, platform=platform)
        _trim(place)

    return key, cache.layer("wheels", key, make)


def install_wheels(place: Path, lock: Path, what: str, *, python: str, platform: str) -> None:
    """The pinned wheels of a lock file, for another Python than this one (`3.11`) and a platform in pip's words."""
    pip = [sys.executable, "-m", "pip"]
    try:
        run([*pip, "--version"], "looking for pip")
    except BuildError:
        # Debian's own pip, when this program lives in an environment that has none.
        find_tool("pip3")
        pip = ["pip3"]
    run(
        [
            *pip,
            "install",
            "--quiet",
            "--no-input",
            "--disable-pip-version-check",
            "--no-compile",
            "--no-deps",
            "--require-hashes",
            "--only-binary=:all:",
            f"--platform={platform}",
            f"--python-version={python}",
            "--implementation=cp",
            f"--abi=cp{python.replace('.', '')}",
            "--abi=abi3",
            "--abi=none",
            f"--target={place}",
            f"--requirement={lock}",
        ],
        what,
        env=_pip_settings(),
    )


def _pip_settings() -> dict[str, str]:
    """The caller's own pip settings say where packages come from here: they must reach pip."""
    return {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "SSL_", "REQUESTS_"))}


def _trim(place: Path) -> None:
    for name in _UNUSED_TWISTED:
        remove_tree(place / "twisted" / name)
    for name in _UNUSED:
        for path in (place / name, *place.glob(f"{name}*.dist-info")):
            path.unlink() if path.is_file() else remove_tree(path)
    for path in sorted(place.rglob("*"), reverse=True):
        if path.is_dir():
            if path.name in ("test", "tests", "__pycache__"):
                shutil.rmtree(path)
        elif path.suffix in _UNUSED_SUFFIXES or path.name in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json"):
            path.unlink()
