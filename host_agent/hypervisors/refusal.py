"""Why this host's accelerator is not to be used, told to the host agents to come: each wrapper starts one of its own.

What KVM did to one guest it will do to the next, and a probe that it fails takes seconds. So the reason is kept until
the host starts anew, for the QEMU that it was found with. It saves time and nothing else: a file that cannot be read,
or that does not look like ours, is as good as none.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from pathlib import Path

import psutil
from twisted.logger import Logger

from common.errors import VMwrapperError
from common.files import runtime_dir, write_private
from host_agent.process_identity import boot_id

FILE = "accelerator.json"  # in the runtime directory, which all host agents of a user share
LONGEST = 200  # characters of a reason
_MOST = 4096  # bytes of the file


class Refusal:
    """The reason, for one accelerator of one QEMU."""

    _log = Logger()

    def __init__(self, qemu: str, accelerator: tuple[str, ...]) -> None:
        self._qemu = qemu
        self._accelerator = accelerator

    def read(self) -> str:
        """Empty: there is none that counts now."""
        try:
            told = json.loads(_read_own(runtime_dir() / FILE))
            return one_line(str(told["why_not"])) if told["of"] == self._of() else ""
        except (OSError, ValueError, KeyError, TypeError, RecursionError, VMwrapperError):
            return ""

    def keep(self, why_not: str) -> None:
        try:
            told = {"of": self._of(), "why_not": one_line(why_not)}
            write_private(runtime_dir() / FILE, json.dumps(told).encode("ascii"))
        except (OSError, VMwrapperError) as error:
            self._log.warn("the next host agent has to find out by itself: {error}", error=error)

    def forget(self) -> None:
        with contextlib.suppress(OSError, VMwrapperError):
            (runtime_dir() / FILE).unlink(missing_ok=True)

    def _of(self) -> list[str]:
        """What it was found with; as soon as one of these is another it says nothing any more. OSError."""
        path = Path(shutil.which(self._qemu) or self._qemu)
        found = path.stat()
        # Where the system gives a boot no name its moment stands for it. Who sets the clock has it found out anew.
        boot = boot_id() or f"{psutil.boot_time() / 60:.0f}"
        return [boot, str(path), str(found.st_size), str(found.st_mtime_ns), *self._accelerator]


def one_line(words: str) -> str:
    """What a program said, fit for a log."""
    return "".join(each for each in " ".join(words.split()) if each.isprintable())[:LONGEST]


def _read_own(path: Path) -> bytes:
    """A small file of ours that is a file; nothing else is waited for or followed. OSError."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    handle = os.open(path, flags)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or (hasattr(os, "getuid") and found.st_uid != os.getuid()):
            raise OSError(f"{path} is not a file of this user's")
        return os.read(handle, _MOST)
    finally:
        os.close(handle)
