"""Every file and directory that our programs leave on a disk, named once (`docs/files-on-disk.md` lists them)."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .errors import ConfigError

# In the slot directory of the BOINC client
JOB_FILE = "job.xml"
HOST_AGENT_LOG = "host-agent.log"
HOST_AGENT_STATE = "host-agent"
SLOT_IMAGES = "images"  # guest images that come with the application

# In the home of the guest agent
GUEST_STATE = ".vmwrapper"
GUEST_JOURNAL = "journal"
KEEPER_SOCKET = "keeper.sock"
KEEPER_SOCKETS = "keeper-*.sock"  # in the runtime directory, of homes whose paths are too long

LONGEST_SOCKET = 107  # bytes of a Unix socket's path
LONGEST_RUNTIME = LONGEST_SOCKET - len("/vms/t-0123456789ab-4194304/61613.sock")  # the longest of ours below it


def failed_console(slot: Path, vm: str) -> Path:
    """The console of a VM that failed."""
    return slot / f"vm_failed_{vm.replace(' ', '_')}.console.log"


def failed_screen(slot: Path, vm: str) -> Path:
    """A picture of its screen."""
    return slot / f"vm_failed_{vm.replace(' ', '_')}.screen.png"


def runtime_dir() -> Path:
    """This user's private place for sockets and endpoint files: short, on local disk, mode 0700.

    Unix socket paths are limited to 107 bytes, and slot directories can be deep: hence one place for all.
    """
    chosen = os.environ.get("VMWRAPPER_RUNTIME")
    if chosen:
        path = Path(chosen)
    elif os.environ.get("XDG_RUNTIME_DIR"):
        path = Path(os.environ["XDG_RUNTIME_DIR"]) / "vmwrapper"
    else:
        user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
        path = _temporary() / f"vmwrapper-{user}"
    if hasattr(os, "getuid") and len(os.fsencode(path)) > LONGEST_RUNTIME:
        raise ConfigError(
            f"the path {path} is too long to hold sockets: it may have {LONGEST_RUNTIME} bytes",
            "set VMWRAPPER_RUNTIME to a directory with a short path",
        )
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise ConfigError(f"{path} belongs to another user", "set VMWRAPPER_RUNTIME to a directory of your own")
        if found.st_mode & 0o077:
            path.chmod(0o700)
    return path


def _temporary() -> Path:
    """What `tempfile.gettempdir()` finds; its module costs 4 MB, which a job on the host alone does not need."""
    if os.name == "posix":
        for name in (*(os.environ.get(variable) for variable in ("TMPDIR", "TEMP", "TMP")), "/tmp"):  # noqa: S108
            if name and Path(name).is_dir() and os.access(name, os.W_OK | os.X_OK):
                return Path(name).absolute()
    import tempfile

    return Path(tempfile.gettempdir())


def endpoints_dir() -> Path:
    """Where host agents leave their endpoint files and control sockets."""
    path = runtime_dir() / "agents"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def keeper_socket(home: Path) -> Path:
    """Where the keeper of a guest agent with this home listens: beside its journal, unless that path is too long."""
    path = home / GUEST_STATE / KEEPER_SOCKET
    if len(os.fsencode(path)) <= LONGEST_SOCKET:
        return path
    import hashlib

    return runtime_dir() / f"keeper-{hashlib.sha256(os.fsencode(home)).hexdigest()[:16]}.sock"


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def confine(root: Path, path: str) -> Path:
    """The absolute path of `path` below `root`; ConfigError when it leads out of it, by `..` or by a link."""
    if not path:
        return root.resolve()
    if "\0" in path or Path(path).is_absolute() or ".." in Path(path).parts:
        raise ConfigError(f"{path!r} must be a relative path without '..'")
    base = root.resolve()
    full = (base / path).resolve()
    if full != base and base not in full.parents:
        raise ConfigError(f"{path!r} leads out of {base} by a link")
    return full
