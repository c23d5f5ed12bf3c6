"""A directory of this host in a guest, by virtiofs: QEMU's own virtiofsd, as Debian has it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .packages import Unavailable, need

VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
TAG = "bench"
DEADLINE = 30.0


@contextmanager
def virtiofs(folder: Path, memory_mb: int) -> Iterator[tuple[Path, list[str]]]:
    """The shared directory, and what QEMU needs for it. virtiofsd ends with the QEMU that it serves, or here."""
    need("qemu-system-common")
    if not VIRTIOFSD.exists():
        raise Unavailable(f"there is no {VIRTIOFSD}: this is not QEMU 7.2 as Debian 12 has it")
    shared, path, log = folder / "shared", folder / "virtiofs.sock", folder / "virtiofsd.log"
    shared.mkdir()
    shared.chmod(0o777)  # the guest's user is not ours
    # "chroot" instead of namespaces: it also works in a container.
    argv = [str(VIRTIOFSD), f"--socket-path={path}", "-o", f"source={shared}", "-o", "sandbox=chroot"]
    with log.open("wb") as file:
        daemon = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        until = time.monotonic() + DEADLINE
        while not path.exists():
            if daemon.poll() is not None or time.monotonic() > until:
                raise Unavailable(f"virtiofsd does not run here: {' '.join(log.read_text().split())[-300:]}")
            time.sleep(0.05)
        options = ["-object", f"memory-backend-memfd,id=shared,size={memory_mb}M,share=on"]
        options += ["-machine", "memory-backend=shared", "-chardev", f"socket,id=virtiofs,path={path}"]
        yield shared, [*options, "-device", f"vhost-user-fs-pci,chardev=virtiofs,tag={TAG}"]
    finally:
        if daemon.poll() is None:
            daemon.terminate()
        daemon.wait(DEADLINE)
