"""Programs that build an image: found, run, and their failures told in one sentence."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.errors import VMwrapperError

Progress = Callable[[str], None]

# 2023-11-14: any fixed moment will do, it only must never change between two builds.
SOURCE_DATE_EPOCH = 1_700_000_000

_PACKAGES = {
    "mmdebstrap": "mmdebstrap",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "mke2fs": "e2fsprogs",
    "qemu-img": "qemu-utils",
    "lz4": "lz4",
    "mkfs.fat": "dosfstools",
    "mmd": "mtools",
    "mcopy": "mtools",
    "syslinux": "syslinux",
    "tar": "tar",
    "unshare": "util-linux",
    "newuidmap": "uidmap",
    "chroot": "coreutils",
}
_FILES = {
    "/usr/lib/syslinux/mbr/mbr.bin": "syslinux-common",
    "/usr/lib/systemd/boot/efi/systemd-bootx64.efi": "systemd-boot-efi",
}
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class BuildError(VMwrapperError):
    """The image could not be built."""


def find_tool(name: str) -> str:
    """Absolute path of a program; BuildError names the Debian package that has it."""
    # mke2fs and chroot live in sbin, which an ordinary user's PATH does not have.
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}")
    if path is None:
        package = _PACKAGES.get(name, name)
        raise BuildError(f"building an image needs the program {name}, which is not here", f"apt install {package}")
    return path


def find_file(name: str) -> Path:
    """A file that one of this host's packages has; BuildError names it."""
    path = Path(name)
    if not path.is_file():
        raise BuildError(f"building an image needs {name}, which is not here", f"apt install {_FILES[name]}")
    return path


def run(
    argv: Sequence[str | os.PathLike[str]],
    what: str,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    data: bytes | None = None,
    timeout: float = 900,
) -> bytes:
    """Run a program and return its output; BuildError says `what` failed and the program's last words.

    `env` is added to a small fixed environment: the caller's own must not change the image.
    """
    command = [find_tool(os.fspath(argv[0])), *(os.fspath(word) for word in argv[1:])]
    environment = {
        "PATH": _SYSTEM_PATH,
        "LC_ALL": "C.UTF-8",
        "SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH),
        **{k: v for k, v in os.environ.items() if k.lower().endswith("_proxy") or k in ("HOME", "TMPDIR")},
        **(env or {}),
    }
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            input=data if data is not None else b"",
            capture_output=True,
            timeout=timeout,
            check=False,
            umask=0o022,  # the caller's may be stricter, and would then shut the guest's user out of its own files
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"{what}: {argv[0]} did not end within {timeout:.0f} s") from None
    except OSError as error:
        raise BuildError(f"{what}: {argv[0]} could not be started ({error.strerror})") from None
    if done.returncode:
        raise _failure(what, os.fspath(argv[0]), done.returncode, done.stderr.decode("utf-8", "replace"))
    return done.stdout


_NO_NETWORK = (
    "Could not resolve",
    "Temporary failure resolving",
    "Could not connect",
    "Failed to fetch",
    "Connection timed out",
    "Network is unreachable",
    "NewConnectionError",
    "Max retries exceeded",
)


def _failure(what: str, program: str, status: int, stderr: str) -> BuildError:
    if "No space left on device" in stderr:
        return disk_full(what)
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    # The first error is the cause; without one, the last line is the nearest to it.
    # (mmdebstrap's own "failed" lines only repeat the command.)
    lines = [line for line in lines if not line.startswith(("E: setup failed", "E: mmdebstrap failed", "I: "))]
    telling = [line for line in lines if line.startswith(("E:", "ERROR", "dpkg: error", "chroot:"))]
    last = (telling[:1] or lines[-1:] or ["it gave no reason"])[0][:300]
    if any(sign in stderr for sign in _NO_NETWORK):
        return BuildError(
            f"{what}: the packages could not be fetched ({last})",
            "check this host's network, proxy settings and apt sources",
        )
    return BuildError(f"{what}: {program} ended with status {status}: {last}")


def disk_full(what: str) -> BuildError:
    return BuildError(f"{what}: the disk is full", "free some space, or choose another place with --cache")


def explain_os_error(what: str, error: OSError) -> BuildError:
    """The sentence for a file operation that failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(what)
    return BuildError(f"{what}: {error.strerror or error}{f' ({error.filename})' if error.filename else ''}")


def as_root() -> list[str]:
    """What to put before a command that must own files as root: nothing, or a user namespace."""
    if os.geteuid() == 0:
        return []
    find_tool("newuidmap")
    return ["unshare", "--user", "--map-root-user", "--map-auto", "--"]


@contextmanager
def remove_after(path: Path) -> Iterator[Path]:
    """A new directory for the time of the block."""
    path.mkdir()
    try:
        yield path
    finally:
        remove_tree(path)


def remove_tree(path: Path) -> None:
    """Remove a directory, also one whose files belong to other users of a user namespace."""
    if not path.exists():
        return
    shutil.rmtree(path, ignore_errors=True)
    if path.exists() and os.geteuid() != 0:
        run([*as_root(), "rm", "-rf", "--", path], f"removing {path}")
