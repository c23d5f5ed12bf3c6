"""The ledger: what a host agent makes on this host for a VM, written down before it exists.

One directory for each VM, `<runtime>/vms/<instance>/`, holds the VM's sockets and `entry.json`: who owns it, which
process carries it, and which other directory belongs to it. An agent removes its entries itself; `sweep` removes
those whose owner is provably dead, and nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import psutil

from common.files import runtime_dir, write_private

from .control_client import remove_dead_endpoints

ENTRY = "entry.json"
SAVED_BY_VIRTUALBOX = "machine/Snapshots/*.sav"  # states and snapshots, below the directory of a VM
STATES = "states.json"  # in the directory of a VM that can be restored


def ledger_dir() -> Path:
    path = runtime_dir() / "vms"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


class LedgerEntry:
    """What one VM has on this host. Made before everything that it names; a host agent that takes the VM over makes
    it its own."""

    def __init__(self, instance: str, directory: Path) -> None:
        self.path = ledger_dir() / instance
        self._value: dict[str, Any] = {"owner": identity_of(os.getpid()), "directory": str(directory), "process": None}
        self.path.mkdir(mode=0o700, exist_ok=True)
        self._write()

    def has_process(self, pid: int, leash: int | None = None) -> None:
        """The VM is carried by this process, and by a leash that cleans up by itself when no agent comes back."""
        self._value["process"] = identity_of(pid)
        self._value["leash"] = None if leash is None else identity_of(leash)
        self._write()

    def has_machine(self, hypervisor: str, machine: str) -> None:
        """The hypervisor keeps a list of its machines, and is about to have this one in it."""
        self._value["machine"] = [hypervisor, machine]
        self._write()

    def _write(self) -> None:
        write_private(self.path / ENTRY, json.dumps(self._value).encode("utf-8"))

    def close(self) -> None:
        """All that it names is gone."""
        shutil.rmtree(self.path, ignore_errors=True)


def sweep() -> list[str]:
    """Remove what dead host agents left behind; returns a sentence for each thing removed."""
    removed = []
    for place in sorted(ledger_dir().iterdir()):
        try:
            value = json.loads((place / ENTRY).read_bytes())
            owner, process, directory = value["owner"], value["process"], Path(value["directory"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being made at this moment, or not ours: leave it
        leash = value.get("leash")
        if is_alive(owner) or (leash is not None and is_alive(leash)):
            continue
        if process is not None and is_alive(process):
            _kill(process[0])
            removed.append(f"ended process {process[0]} of the VM {place.name}")
        if value.get("machine"):
            hypervisor, machine = value["machine"]
            if any(directory.glob(SAVED_BY_VIRTUALBOX)):
                # The entry stays as well: should the directory go, the next sweep removes the rest.
                removed.append(f"kept {directory}: its VM can be restored")
                continue
            why_not = _unregister(hypervisor, machine, directory)
            if why_not:
                # What it has is known to the hypervisor still: the entry stays for the next sweep.
                removed.append(f"could not remove the VM {place.name} from its hypervisor: {why_not}")
                continue
            removed.append(f"removed the VM {place.name} from {hypervisor}")
        if (directory / STATES).exists():
            removed.append(f"kept {directory}: its VM can be restored")
        elif directory.is_dir() and directory.name.startswith("vm-"):
            shutil.rmtree(directory, ignore_errors=True)
            removed.append(f"removed {directory}")
        shutil.rmtree(place, ignore_errors=True)
        removed.append(f"removed {place}")
    return removed + [f"removed {file}: its host agent was killed" for file in remove_dead_endpoints()]


def _unregister(hypervisor: str, machine: str, directory: Path) -> str:
    """Remove a machine from its hypervisor's list; returns why it did not work."""
    if hypervisor != "virtualbox":
        return f"this version knows no hypervisor {hypervisor}"
    from .hypervisors.virtualbox.one_call import remove

    return remove(machine, directory)


def owned_by_another(instance: str) -> bool:
    """Whether a living process other than this one has the VM."""
    try:
        owner = json.loads((ledger_dir() / instance / ENTRY).read_bytes())["owner"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return owner[0] != os.getpid() and is_alive(owner)


def identity_of(pid: int) -> list[Any]:
    """A process as (pid, start time): a pid alone may be somebody else's by now."""
    try:
        return [pid, psutil.Process(pid).create_time()]
    except psutil.Error:
        return [pid, 0.0]


def is_alive(identity: list[Any]) -> bool:
    try:
        process = psutil.Process(identity[0])
        return abs(process.create_time() - identity[1]) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True  # cannot be told: leave it


def _kill(pid: int) -> None:
    try:
        process = psutil.Process(pid)
        process.kill()
        process.wait(5)
    except psutil.Error:
        pass
