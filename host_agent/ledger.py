"""The ledger: what we make on this host, written down before it exists.

One directory for each VM, `<runtime>/vms/<instance>/`, holds the VM's sockets and `entry.json`: who owns it, which
process carries it, and which other directory belongs to it. An agent removes its entries itself; `sweep` removes
those whose owner is provably dead, and nothing else. (Control groups of tasks on the host: `wrapper/task_groups.py`.)

A VM outlives its host agent for the grace time. QEMU's has a leash, which is as good as an owner; one that the
hypervisor carries by itself has none, and so the first sweep that finds it alone only notes when that was.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import time
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.files import KEEPER_SOCKETS, runtime_dir, write_private

from .control_client import remove_dead_endpoints
from .file_lock import ledger_lock
from .process_identity import Identity, identity_of, is_alive

ENTRY = "entry.json"
SAVED_BY_VIRTUALBOX = "machine/Snapshots/*.sav"  # states and snapshots, below the directory of a VM
STATES = "states.json"  # in the directory of a VM that can be restored
KEEPER_STARTS = 60.0  # seconds in which one may have its socket and not listen yet
NOBODY: Identity = [0, ""]
SWEPT = ".swept-"  # in the name of an entry that a sweep removes
GRACE = 60.0  # seconds that a VM goes on without a host agent, unless VMWRAPPER_GRACE says another number


def grace_time() -> float:
    text = os.environ.get("VMWRAPPER_GRACE", "")
    try:
        return max(0.0, float(text)) if text else GRACE
    except ValueError:
        raise ConfigError(f"VMWRAPPER_GRACE is {text!r}", "set it to a number of seconds") from None


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
        with ledger_lock():  # a sweep is not to take it for what a dead agent left
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

    def release(self) -> None:
        """It is nobody's, until the next agent takes the VM over; meanwhile its leash looks after it."""
        self._value["owner"] = NOBODY
        self._write()

    def _write(self) -> None:
        write_private(self.path / ENTRY, json.dumps(self._value).encode("utf-8"))

    def close(self) -> None:
        """All that it names is gone."""
        shutil.rmtree(self.path, ignore_errors=True)


def sweep() -> list[str]:
    """Remove what dead host agents and wrappers left behind; returns a sentence for each thing removed.

    A hypervisor may take minutes for it: not to be called on a reactor's thread.
    """
    from .state import remove_unused_states
    from .wrapper.task_groups import sweep_groups

    removed = []
    for place in sorted(ledger_dir().iterdir()):
        removed += _sweep_one(place)
    removed += sweep_groups() + remove_unused_states() + _remove_dead_keepers()
    return removed + [f"removed {file}: its host agent was killed" for file in remove_dead_endpoints()]


def _sweep_one(place: Path) -> list[str]:
    instance = place.name.partition(SWEPT)[0]
    claimed = place.with_name(f"{instance}{SWEPT}{secrets.token_hex(4)}")
    with ledger_lock():
        value = _read(place)
        if value is None or not _is_dead(value):
            return []
        if value.get("machine") and not value.get("sweeper") and (waits := _may_be_missed(place, value)) is not None:
            return waits
        # From here on it is ours alone: other sweeps leave it, and an agent that restores the VM makes another entry.
        write_private(place / ENTRY, json.dumps({**value, "sweeper": identity_of(os.getpid())}).encode("utf-8"))
        place.rename(claimed)
    removed, keep = _remove(instance, value)
    with ledger_lock():
        again = ledger_dir() / instance
        if keep and not again.exists():
            write_private(claimed / ENTRY, json.dumps(value).encode("utf-8"))
            claimed.rename(again)
            return removed
    shutil.rmtree(claimed, ignore_errors=True)
    return [*removed, f"removed {again}"]


def _read(place: Path) -> dict[str, Any] | None:
    """An entry; None when it is being made at this moment, or is not ours."""
    try:
        value = json.loads((place / ENTRY).read_bytes())
        return {**value, "owner": value["owner"][:2], "process": value["process"], "directory": value["directory"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_dead(value: dict[str, Any]) -> bool:
    """Whether nobody is left who would see to the VM."""
    return not any(is_alive(value[who]) for who in ("owner", "leash", "sweeper") if value.get(who))


def _may_be_missed(place: Path, value: dict[str, Any]) -> list[str] | None:
    """What to say of a VM that the next host agent of its slot may take over yet; None when its time is over."""
    grace, now = grace_time(), time.time()
    if "alone_since" in value:
        return [] if value["alone_since"] <= now < value["alone_since"] + grace else None
    if not grace:
        return None
    write_private(place / ENTRY, json.dumps({**value, "alone_since": now}).encode("utf-8"))
    return [f"left the VM {place.name} to the next host agent of its slot, for {grace:.0f} s"]


def some_wait() -> bool:
    """Whether the last sweep left something to the next one."""
    alone = [(_read(place) or {}).get("alone_since", 0.0) for place in ledger_dir().iterdir()]
    return any(since + grace_time() > time.time() for since in alone)


def _remove(instance: str, value: dict[str, Any]) -> tuple[list[str], bool]:
    """Remove what an entry names. Returns what was done, and whether the entry has to stay for the next sweep."""
    removed, process, directory = [], value["process"], Path(value["directory"])
    if process is not None and is_alive(process):
        _kill(process[0])
        removed.append(f"ended process {process[0]} of the VM {instance}")
    if value.get("machine"):
        hypervisor, machine = value["machine"]
        if any(directory.glob(SAVED_BY_VIRTUALBOX)):
            # Should the directory go, the next sweep removes the rest.
            return [*removed, f"kept {directory}: its VM can be restored"], True
        why_not = _unregister(hypervisor, machine, directory)
        if why_not:  # what it has is known to the hypervisor still
            return [*removed, f"could not remove the VM {instance} from its hypervisor: {why_not}"], True
        removed.append(f"removed the VM {instance} from {hypervisor}")
    if (directory / STATES).exists():
        removed.append(f"kept {directory}: its VM can be restored")
    elif directory.is_dir() and directory.name.startswith("vm-"):
        shutil.rmtree(directory, ignore_errors=True)
        removed.append(f"removed {directory}")
    return removed, False


def _remove_dead_keepers() -> list[str]:
    """Sockets of keepers that were killed, of guest agents that run on this host; nobody listens there."""
    removed = []
    for path in runtime_dir().glob(KEEPER_SOCKETS):
        try:
            if time.time() - path.stat().st_mtime < KEEPER_STARTS:
                continue
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(1.0)
                client.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            removed.append(f"removed {path}: its keeper was killed")
        except OSError:
            continue  # it lives, or is gone
    return removed


def _unregister(hypervisor: str, machine: str, directory: Path) -> str:
    """Remove a machine from its hypervisor's list; returns why it did not work."""
    if hypervisor != "virtualbox":
        return f"this version knows no hypervisor {hypervisor}"
    from .hypervisors.virtualbox.one_call import remove

    return remove(machine, directory)


def other_owner(instance: str) -> int | None:
    """The living process that has the VM, if it is not this one."""
    try:
        owner = json.loads((ledger_dir() / instance / ENTRY).read_bytes())["owner"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return int(owner[0]) if owner[0] != os.getpid() and is_alive(owner) else None


def _kill(pid: int) -> None:
    import psutil

    try:
        process = psutil.Process(pid)
        process.kill()
        process.wait(5)
    except psutil.Error:
        pass
