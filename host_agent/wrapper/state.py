"""`vmwrapper_state.json`: what a restarted wrapper must know beside BOINC's `wrapper_checkpoint.txt`.

Two lines: a JSON object and its CRC-32. It is replaced as a whole; should a disk lose part of it all the same,
the second line says so, and the file counts as not there. (A cryptographic sum would bring 4 MB of OpenSSL.)
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoint import write_atomically

STATE_FILE = "vmwrapper_state.json"
_MOST_BYTES = 1 << 20
_NOTHING: Mapping[str, Any] = {}


class CommandRecord(NamedTuple):
    """The program of a task in a VM, written down before the host agent is asked to run it."""

    task: int  # its number in the job, from 1
    vm: str
    instance: str  # which incarnation of the VM: a new one knows nothing of the command
    command: str  # its id, chosen by us: to ask again for the same id is to ask for the same run
    asked: bool = False  # the inputs are in the VM, and the host agent may know the id
    agent: str = ""  # the host agent's state directory
    output_starts: Mapping[str, int] = _NOTHING  # sizes of the output files before the task
    output_kept: Mapping[str, int] = _NOTHING  # and when its program's own checkpoint was copied
    output_copied: Mapping[str, int] = _NOTHING  # the same of a copy that takes the last one's place
    copied: str = ""  # which copy that is
    cpu_s: float = 0.0  # of the task: its part of what the checkpoint counts
    cpu_before_s: float = 0.0  # of the task before this command, which goes on from its program's own checkpoint


class State(NamedTuple):
    """Everything in the file."""

    commands: tuple[CommandRecord, ...] = ()  # of the tasks that run at once; at most one of each
    group_done: tuple[int, ...] = ()  # numbers of the tasks of the present group that need not run again
    ran_s: Mapping[str, float] = _NOTHING  # by task: of those that run and have a time limit
    temporary_exits: int = 0  # since there was progress
    trickle_s: float | None = None  # the period that the project asked for; None: the option's
    trickles: int = 0  # sent so far
    end_early: bool = False  # the project wants no more


class StateFile:
    """The state, and its file in the slot."""

    def __init__(self, slot: Path) -> None:
        self._path = slot / STATE_FILE
        self.state = read_state(self._path) or State()

    def command_of(self, task: int) -> CommandRecord | None:
        """What is written down of a task's program, if anything."""
        return next((record for record in self.state.commands if record.task == task), None)

    def keep_command(self, record: CommandRecord) -> None:
        """Write it down in the place of what was known of that task."""
        others = (other for other in self.state.commands if other.task != record.task)
        self.change(commands=(*others, record))

    def change(self, **values: Any) -> None:
        """Change some of it; when this returns, it is on the disk."""
        changed = self.state._replace(**values)
        if changed != self.state:
            self.state = changed
            write_atomically(self._path, state_text(changed))


def state_text(state: State) -> str:
    """The file's content."""
    values = {**state._asdict(), "commands": [record._asdict() for record in state.commands]}
    line = json.dumps(values, sort_keys=True)
    return f"{line}\n{zlib.crc32(line.encode()):08x}\n"


def read_state(path: Path) -> State | None:
    """A state, or None when there is none that is whole and of our making."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES)
        line, digest, rest = data.split(b"\n")
        if rest or digest.decode("ascii") != f"{zlib.crc32(line):08x}":
            return None
        values = json.loads(line)
        records = values.pop("commands", ())
        if "command" in values:  # version 0.1 ran one task at a time
            one = values.pop("command")
            records = [one] if one is not None else []
        values["commands"] = tuple(CommandRecord(**record) for record in records)
        values["group_done"] = tuple(values.get("group_done", ()))
        return State(**values)
    except (OSError, ValueError, TypeError, KeyError):
        return None
