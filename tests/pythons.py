"""Other versions of Python than the one that runs the tests, from the Debian release that has them."""

from __future__ import annotations

import shutil
from pathlib import Path

from vm_images.cache import Cache, default_cache, digest_of
from vm_images.sources import debian_sources
from vm_images.tools import run

RELEASES = {"3.9": "bullseye", "newest": "sid"}
LOADER = "ld-linux-x86-64.so.2"


def other_pythons() -> list[str]:
    """Versions besides that this machine happens to have."""
    return [version for version in ("3.10", "3.11", "3.12", "3.13") if _here(version)]


def _here(version: str) -> Path | None:
    program = shutil.which(f"python{version}")
    if program is None:
        return None
    try:
        # A name on the path may only be a wrapper that knows of no such version.
        said = run([program, "-I", "-c", "import sys; print(sys.executable)"], "asking a Python")
    except Exception:
        return None
    return Path(said.decode().strip())


def python_of(version: str) -> Path:
    """A program that runs this Python."""
    if version in RELEASES:
        return _from_debian(RELEASES[version]) / "python"
    found = _here(version)
    assert found is not None
    return found


def _from_debian(release: str) -> Path:
    sources = debian_sources(release)
    key = digest_of(["test-python", "\n".join(sources), Path(__file__).read_bytes()])

    def make(place: Path) -> None:
        root = place.resolve() / "root"
        run(
            [
                *("mmdebstrap", "--mode=auto", "--variant=extract", "--include=python3,libpython3-stdlib"),
                # The archive's list of these releases may be older than it says it stays valid.
                '--aptopt=Acquire::Check-Valid-Until "false"',
                *("--format=dir", release, root, "-"),
            ],
            f"fetching the Python of {release}",
            data="".join(f"{line}\n" for line in sources).encode(),
        )
        (program,) = [path for path in (root / "usr/bin").glob("python3.*") if path.name.count(".") == 1]
        final = Path(*[part if part != place.name else key[:40] for part in root.parts])
        places = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")
        where = next(name for name in places if (root / name / LOADER).exists())
        loader = f"{final / where / LOADER} --library-path {':'.join(str(final / name) for name in places)}"
        script = f'#!/bin/sh\nexec {loader} {final}/usr/bin/{program.name} "$@"\n'
        (place / "python").write_text(script)
        (place / "python").chmod(0o755)

    return cache_of_tests().layer("test-python", key, make)


def cache_of_tests() -> Cache:
    return Cache(default_cache().absolute())
