"""What a host agent must know to go on after it was killed: its *state directory*, for one agent at a time.

agent.json    its id, and its VMs with their identities (mode 0600: it holds secrets)
outbox        what it has asked of guests (`outbox.py`)
output/       spools of output that nobody wanted in a file (`streams.py`)
marks/        how far every command was when a VM's snapshot was taken
lock          held while an agent runs
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import attrs

from common.errors import ConfigError
from common.files import runtime_dir, write_private
from common.link import new_session

from .file_lock import ledger_lock, try_lock
from .outbox import Outbox

FORMAT = 1


@attrs.frozen
class VmRecord:
    """A VM as the next agent has to know it. `directory` holds its disk; `epoch` counts its boots and restores."""

    instance: str
    name: str
    image: str
    directory: str
    memory_mb: int
    cpus: int
    login: str  # at the broker
    passcode: str = attrs.field(repr=False)
    secret: str = attrs.field(repr=False)
    epoch: int
    boot: str = ""
    network: bool = False  # it has a way out


class AgentState:
    """Opens a state directory, makes it when there is none, and keeps it to this process."""

    def __init__(self, directory: Path, *, durable: bool = True) -> None:
        """`durable`: somebody knows the place, and may start a successor there."""
        self.directory = directory
        self.durable = durable
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
            for name in ("output", "marks"):
                (directory / name).mkdir(mode=0o700, exist_ok=True)
            self._lock = _lock(directory / "lock")
        except OSError as error:
            raise ConfigError(f"the state directory {directory} cannot be used: {error.strerror}") from None
        self.vms: dict[str, VmRecord] = {}
        self._texts: dict[str, str] = {}  # of each as JSON: with 1,000 of them, making all anew is what costs
        self.agent_id = f"h-{new_session()}"
        self._load()
        self.outbox = Outbox(directory / "outbox")

    @property
    def output(self) -> Path:
        return self.directory / "output"

    def _load(self) -> None:
        file = self.directory / "agent.json"
        try:
            value: dict[str, Any] = json.loads(file.read_bytes())
            if value["format"] != FORMAT:
                raise ConfigError(f"{file}: format {value['format']!r} is not {FORMAT}", "give another --state")
            self.agent_id = str(value["agent"])
            records = [VmRecord(**each) for each in value["vms"]]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file}: this is not a host agent's state ({error!r})", "remove it, or give another --state"
            ) from None
        self.vms = {record.instance: record for record in records}
        self._texts = {record.instance: _text_of(record) for record in records}

    def keep(self, record: VmRecord) -> None:
        """Note a VM, or what has changed of it; on disk when this returns."""
        if self.vms.get(record.instance) != record:
            self.vms[record.instance] = record
            self._texts[record.instance] = _text_of(record)
            self._save()

    def drop(self, instance: str) -> None:
        """The VM is no more."""
        if self.vms.pop(instance, None) is not None:
            del self._texts[instance]
            self._save()
        for mark in self.marks(instance):
            mark.unlink(missing_ok=True)

    def marks(self, instance: str) -> list[Path]:
        """The marks of a VM's snapshots that there are."""
        return list((self.directory / "marks").glob(f"{instance}.*"))

    def mark_file(self, instance: str, snapshot: str) -> Path:
        """Where the mark of a snapshot stands."""
        return self.directory / "marks" / f"{instance}.{snapshot}"

    def _save(self) -> None:
        head = json.dumps({"format": FORMAT, "agent": self.agent_id})
        text = f'{head[:-1]}, "vms": [{", ".join(self._texts.values())}]}}'
        write_private(self.directory / "agent.json", text.encode("ascii"))

    def close(self, *, remove: bool = False) -> None:
        """Let another agent use it; `remove` when nothing in it will be asked for."""
        self.outbox.close()
        os.close(self._lock)
        if remove:
            shutil.rmtree(self.directory, ignore_errors=True)


def _text_of(record: VmRecord) -> str:
    return json.dumps(attrs.asdict(record))


def open_state(directory: Path | None) -> AgentState:
    """The state directory that was asked for; without one, a directory that ends with the agent."""
    if directory is not None:
        return AgentState(directory.absolute())
    with ledger_lock():  # no sweep is to take the new one for what a killed agent left
        _remove_unused()
        return AgentState(_own_states() / f"s-{new_session()}", durable=False)


def remove_unused_states() -> list[str]:
    """What killed agents left; their VMs are swept by what the ledger says. Returns a sentence for each."""
    with ledger_lock():
        return [f"removed {directory}: its host agent was killed" for directory in _remove_unused()]


def _own_states() -> Path:
    place = runtime_dir() / "state"
    place.mkdir(mode=0o700, exist_ok=True)
    return place


def _remove_unused() -> list[Path]:
    removed = []
    for directory in _own_states().iterdir():
        try:
            os.close(_lock(directory / "lock"))
        except (OSError, ConfigError):
            continue
        shutil.rmtree(directory, ignore_errors=True)
        removed.append(directory)
    return removed


def _lock(path: Path) -> int:
    handle = try_lock(path)
    if handle is None:
        raise ConfigError(
            f"the state directory {path.parent} is in use by another host agent", "give each agent its own --state"
        )
    return handle
