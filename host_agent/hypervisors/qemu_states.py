"""States of a QEMU VM on the disk: what each holds, which are complete, and which one `start` goes on from.

A state is a file with memory and devices, compressed, and a snapshot inside the VM's disk image that belongs to it.
It is written under a name of its own, read back, and only then named in `states.json`, which is replaced whole. What
that file does not name is a stray of something that was interrupted, and is removed when the VM is next taken up.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread
from twisted.internet.utils import getProcessOutputAndValue

from common.files import write_private

from .base import HypervisorError
from .leash import STATES

FORMAT = 1
TAG = "vmwrapper-"  # of our snapshots inside disk images
_FILE = re.compile(r"state-[0-9a-f]{16}\.zst")


def _tuple(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(words)


@attrs.frozen
class State:
    """One state. `tag` names its snapshot in the disk image, `accelerator` what drove its guest's processors."""

    name: str
    file: str
    tag: str
    made: float  # time.time()
    size: int = 0  # bytes of the file
    accelerator: tuple[str, ...] = attrs.field(default=(), converter=_tuple)  # (): not noted


class States:
    """All states of one VM, as `states.json` in its directory has them; the oldest first."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._states: dict[str, State] = {}
        self.current: str | None = None  # the one that `start` goes on from, while nothing runs
        self.cpu_seconds = 0.0  # of all processes of this VM that have ended

    @classmethod
    def load(cls, directory: Path) -> States:
        """What is there, or none. HypervisorError when it cannot be read."""
        found = cls(directory)
        path = directory / STATES
        try:
            value: dict[str, Any] = json.loads(path.read_bytes())
            if value["format"] != FORMAT:
                raise HypervisorError(f"{path}: its format {value['format']} is not {FORMAT}")
            for each in value["states"]:
                found._states[each["name"]] = State(**each)
            found.current, found.cpu_seconds = value["current"], float(value["cpu_seconds"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HypervisorError(f"{path}: the VM's saved states cannot be read ({error!r})") from None
        return found

    def __bool__(self) -> bool:
        return bool(self._states)

    def names(self) -> list[str]:
        return list(self._states)

    def get(self, name: str) -> State | None:
        return self._states.get(name)

    def path(self, state: State) -> Path:
        return self._directory / state.file

    def begin(self, name: str, accelerator: tuple[str, ...]) -> State:
        """A state that does not count yet."""
        token = secrets.token_hex(8)
        return State(name, f"state-{token}.zst", f"{TAG}{token}", time.time(), accelerator=accelerator)

    def complete(self, state: State, *, current: bool) -> State | None:
        """It is on the disk and sound: from now on it counts. Returns the one that it replaced."""
        replaced = self._states.pop(state.name, None)
        self._states[state.name] = attrs.evolve(state, size=self.path(state).stat().st_size)
        self.current = state.name if current else None
        self.write()
        if replaced is not None:
            self.path(replaced).unlink(missing_ok=True)
        return replaced

    def remove(self, name: str) -> State | None:
        state = self._states.pop(name, None)
        if state is not None:
            self.current = None if self.current == name else self.current
            self.write()
            self.path(state).unlink(missing_ok=True)
        return state

    def runs(self) -> None:
        """The VM was started from its current state, which remains as a snapshot."""
        self.current = None
        self.write()

    def write(self) -> None:
        path = self._directory / STATES
        if not self._states:
            path.unlink(missing_ok=True)
            return
        value = {
            "format": FORMAT,
            "current": self.current,
            "cpu_seconds": self.cpu_seconds,
            "states": [attrs.asdict(state) for state in self._states.values()],
        }
        write_private(path, json.dumps(value).encode("utf-8"))
        _sync_directory(self._directory)

    def remove_stray_files(self) -> None:
        known = {state.file for state in self._states.values()}
        for path in self._directory.iterdir():
            if _FILE.fullmatch(path.name) and path.name not in known:
                path.unlink(missing_ok=True)

    def stray_tags(self, tags: list[str]) -> list[str]:
        known = {state.tag for state in self._states.values()}
        return [tag for tag in tags if tag.startswith(TAG) and tag not in known]


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync(*paths: Path) -> Deferred[None]:
    """Wait, in a thread, until files are on the disk."""

    def wait() -> None:
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    return deferToThread(wait)


async def run_tool(reactor: Any, deadline: float, sentence: str, program: str, *arguments: str) -> str:
    """Run a program to its end and return what it printed; HypervisorError begins with `sentence`."""
    running = getProcessOutputAndValue(program, list(arguments), env=None, reactor=reactor)
    output, errors, status = await running.addTimeout(deadline, reactor)
    if status:
        words = (errors or output).decode("utf-8", "replace").strip()
        raise HypervisorError(f"{sentence}: {words}")
    return bytes(output).decode("utf-8", "replace")
