"""The Debian layer: a root file system as a tar archive, and the kernel's package beside it."""

from __future__ import annotations

from pathlib import Path

from .cache import Cache, digest_of
from .recipe import Recipe
from .sources import debian_sources
from .tools import find_tool, run

ROOT_TAR = "root.tar"
KERNEL_DEB = "kernel.deb"
PACKAGES = "packages.txt"
CUSTOMIZE = Path(__file__).parent / "guest" / "customize.sh"
# Of the host's apt settings, only how to reach the archive.
_APT_OPTIONS = ("Acquire::http::Proxy", "Acquire::https::Proxy", "Acquire::https::CAInfo")


def debian_key(recipe: Recipe, sources: list[str]) -> str:
    """Digest of everything that decides what the layer holds, but for Debian's own updates."""
    return digest_of(
        [
            "debian",
            recipe.architecture,
            recipe.release,
            recipe.python,
            "\0".join(recipe.packages),
            "\0".join(recipe.exclude),
            "\0".join(recipe.include),
            recipe.kernel,
            "\n".join(sources),
            CUSTOMIZE.read_bytes(),
            Path(__file__).read_bytes(),
        ]
    )


def debian_layer(cache: Cache, recipe: Recipe, *, refresh: bool = False) -> tuple[str, Path]:
    """Key and directory of the layer; `refresh` makes it anew, with Debian's updates of today."""
    sources = debian_sources(recipe.release)
    key = debian_key(recipe, sources)

    def make(place: Path) -> None:
        _mmdebstrap(place, recipe, sources)

    return key, cache.layer("debian", key, make, refresh=refresh)


def _mmdebstrap(place: Path, recipe: Recipe, sources: list[str]) -> None:
    find_tool("apt-get")
    options = [f"--dpkgopt=path-exclude={pattern}" for pattern in recipe.exclude]
    options += [f"--dpkgopt=path-include={pattern}" for pattern in recipe.include]
    options += [f"--aptopt={option}" for option in _apt_options()]
    run(
        [
            "mmdebstrap",
            "--mode=auto",
            "--variant=essential",
            "--format=tar",
            f"--architectures={recipe.debian_architecture}",
            f"--include={','.join(recipe.packages)}",
            *options,
            f"--customize-hook={CUSTOMIZE.read_text('utf-8')}",
            f"--customize-hook=download /kernel.deb {place / KERNEL_DEB}",
            f"--customize-hook=download /packages.txt {place / PACKAGES}",
            '--customize-hook=rm "$1/kernel.deb" "$1/packages.txt"',
            recipe.release,
            place / ROOT_TAR,
            "-",
        ],
        "installing Debian",
        env={"PYTHON": recipe.python, "KERNEL": recipe.kernel},
        data="".join(f"{line}\n" for line in sources).encode(),
    )


def _apt_options() -> list[str]:
    text = run(["apt-config", "dump", *_APT_OPTIONS], "reading apt's settings").decode()
    return [line for line in text.splitlines() if '""' not in line]
