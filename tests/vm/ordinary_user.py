"""Somebody who is not root, and whom a container's tests can be: for what has to work without root."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from pathlib import Path

import attr

from vm_images.rootfs import SOURCES

USER = "vmwrapper-test"


def ordinary_user() -> list[str]:
    """What to put before a command so that it is not root's: nothing for those who are not."""
    if os.geteuid() != 0:
        return []
    try:
        pwd.getpwnam(USER)
    except KeyError:
        # With a range of user numbers of its own, as Debian gives everyone whom useradd makes.
        subprocess.run(["useradd", "--create-home", USER], check=True, timeout=60)
    user = pwd.getpwnam(USER)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--init-groups", "--"]


def take_sources(place: Path) -> None:
    """What building an image needs of ours, where that user can read it."""
    for package in ("common", "guest_agent", "host_agent", "vm_images", "lock"):
        shutil.copytree(SOURCES / package, place / package, ignore=shutil.ignore_patterns("__pycache__"))
    for library in ("attr", "attrs"):
        shutil.copytree(Path(attr.__file__).parents[1] / library, place / library)


def give(place: Path) -> None:
    """All of it is that user's now."""
    if ordinary_user():
        owner = pwd.getpwnam(USER)
        for path in (place, *place.rglob("*")):
            os.chown(path, owner.pw_uid, owner.pw_gid)
    place.chmod(0o755)


def python(place: Path, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run by Debian's own Python, as that user, with the sources in `place`."""
    argv = [*ordinary_user(), "/usr/bin/python3", "-s", "-c", script, *words]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(place), "PYTHONPATH": str(place)}
    return subprocess.run(argv, env=env, cwd=place, capture_output=True, text=True, timeout=600, check=False)
