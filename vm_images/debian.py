"""The Debian layers: a root file system as a tar archive, and the packages of the kernels."""

from __future__ import annotations

from pathlib import Path

from .cache import Cache, digest_of
from .recipe import Recipe
from .sources import debian_sources
from .tools import find_tool, run

ROOT_TAR = "root.tar"
KERNEL_DEB, DISK_KERNEL_DEB = "kernel.deb", "disk-kernel.deb"
PACKAGES = "packages.txt"
CUSTOMIZE = Path(__file__).parent / "guest" / "customize.sh"
FETCH_KERNELS = Path(__file__).parent / "guest" / "fetch-kernels.sh"
# Links /bin, /lib and /sbin from the start: otherwise a package does it, and brings all of Perl.
MERGED = Path("/usr/share/mmdebstrap/hooks/maybe-merged-usr")
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
            f"--hook-dir={MERGED}",
            f"--architectures={recipe.debian_architecture}",
            f"--include={','.join(recipe.packages)}",
            *options,
            f"--customize-hook={CUSTOMIZE.read_text('utf-8')}",
            f"--customize-hook=download /packages.txt {place / PACKAGES}",
            '--customize-hook=rm "$1/packages.txt"',
            recipe.release,
            place / ROOT_TAR,
            "-",
        ],
        "installing Debian",
        env={"PYTHON": recipe.python},
        data="".join(f"{line}\n" for line in sources).encode(),
    )


def kernels_layer(cache: Cache, recipe: Recipe, *, refresh: bool = False) -> Path:
    """Directory with the packages of both kernels. No part of the other layer: every recipe may have the same ones."""
    sources = debian_sources(recipe.release)
    wanted = {KERNEL_DEB: recipe.kernel, DISK_KERNEL_DEB: recipe.disk_kernel}
    words = ["\0".join(wanted.values()), recipe.architecture, "\n".join(sources)]
    key = digest_of(["kernels", *words, FETCH_KERNELS.read_bytes(), Path(__file__).read_bytes()])

    def make(place: Path) -> None:
        hooks = [f"--customize-hook=download /{name} {place / name}" for name in wanted]
        script = f"--customize-hook={FETCH_KERNELS.read_text('utf-8')}"
        form = ["--format=null", f"--architectures={recipe.debian_architecture}"]
        options = [f"--aptopt={option}" for option in _apt_options()]
        run(
            [
                "mmdebstrap",
                "--mode=auto",
                "--variant=custom",
                *form,
                *options,
                script,
                *hooks,
                recipe.release,
                "-",
                "-",
            ],
            "fetching the kernel",
            env={"KERNELS": " ".join(f"{name}={package}" for name, package in wanted.items())},
            data="".join(f"{line}\n" for line in sources).encode(),
        )

    return cache.layer("kernels", key, make, refresh=refresh)


def _apt_options() -> list[str]:
    text = run(["apt-config", "dump", *_APT_OPTIONS], "reading apt's settings").decode()
    return [line for line in text.splitlines() if '""' not in line]
