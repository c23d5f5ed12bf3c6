"""Control groups of tasks on the host, in the ledger: `<runtime>/groups/<name>` says whose each one is.

A wrapper removes its own. One that was killed cannot: its groups are removed, with whatever runs in them still, by the
next wrapper, host agent or `vmctl sweep` of this user.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path

from common.cgroup import TaskGroup, own_group
from common.errors import VMwrapperError
from common.files import runtime_dir

from ..process_identity import identity_of, is_alive
from .checkpoint import write_atomically
from .process_tree import signal_each

PREFIX = "vmwrapper-"
END_DEADLINE_S = 5.0  # for the kernel to end what was killed


def groups_dir() -> Path:
    """Where the entries are. OSError, VMwrapperError."""
    path = runtime_dir() / "groups"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


class HostGroup(TaskGroup):
    """A task's group that is in the ledger before it exists, and as long as it does."""

    @classmethod
    def for_task(cls, parent: Path | None = None) -> HostGroup | None:
        """A new one below our own group, or None where that is not possible."""
        parent = parent or own_group()
        if parent is None or not os.access(parent, os.W_OK):
            return None
        name = f"{PREFIX}{os.getpid()}-{os.urandom(4).hex()}"
        entry = {"owner": identity_of(os.getpid()), "path": str(parent / name)}
        try:
            # Not durable: after a power cut there is no group either.
            write_atomically(groups_dir() / name, json.dumps(entry), durable=False)
        except (OSError, VMwrapperError):
            return None  # what nobody would find again is not made
        group = super().make(name, parent)
        if group is None:
            _forget(name)
            return None
        assert isinstance(group, cls)
        return group

    def remove(self) -> None:
        super().remove()
        if not self.path.exists():
            _forget(self.path.name)


def sweep_groups() -> list[str]:
    """Remove the groups of wrappers that are provably dead; returns a sentence for each."""
    removed: list[str] = []
    for file in sorted(groups_dir().iterdir()):
        try:
            entry = json.loads(file.read_bytes())
            owner, path = entry["owner"], Path(entry["path"])
            if is_alive(owner) or not path.name.startswith(PREFIX):
                continue
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another sweep was quicker, or it is not ours
        if _end(HostGroup(path)):
            file.unlink(missing_ok=True)
            removed.append(f"removed the control group {path}")
        else:
            removed.append(f"could not remove the control group {path}: something in it does not end")
    return removed


def _end(group: HostGroup) -> bool:
    """Remove a group with all that runs in it; whether it is gone."""
    until = time.monotonic() + END_DEADLINE_S
    while group.path.exists():
        # 0: a process of another container, which is not for us to see; as a number it would mean ourselves
        signal_each([pid for pid in group.processes() if pid > 1], signal.SIGKILL)
        group.remove()
        if time.monotonic() >= until:
            return not group.path.exists()
        time.sleep(0.01)
    return True


def _forget(name: str) -> None:
    with contextlib.suppress(OSError, VMwrapperError):
        (groups_dir() / name).unlink()
