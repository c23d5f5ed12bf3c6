"""What the next host agent has to know of a VM, kept in the VM's own directory."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

import attrs

from common.files import write_private
from host_agent.process_identity import Identity, identity_of, is_alive

from ..loopback_ports import LOOPBACK

NAME = "virtualbox.json"


@attrs.frozen
class Record:
    """`ports` are the real ones of the VM's services, which its guest was told; no owner: it was left on purpose."""

    machine: str  # VirtualBox's UUID
    owner: Identity | None
    address: str = LOOPBACK  # of this host, where the services listen
    ports: dict[int, int] = attrs.field(factory=dict)
    cpu_before: float = 0.0  # seconds, of processes that carried this VM earlier

    @classmethod
    def new(cls, address: str = LOOPBACK) -> Record:
        return cls(str(uuid.uuid4()), identity_of(os.getpid()), address)

    @classmethod
    def read(cls, directory: Path) -> Record | None:
        """None when there is none, or it cannot be used."""
        try:
            value = json.loads((directory / NAME).read_bytes())
            owner = [int(value["owner"][0]), value["owner"][1]] if value["owner"] else None
            ports = {int(seen): int(real) for seen, real in value["ports"].items()}
            machine = str(uuid.UUID(value["machine"]))
            return cls(machine, owner, str(value["address"]), ports, float(value["cpu_before"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, directory: Path) -> None:
        write_private(directory / NAME, json.dumps(attrs.asdict(self)).encode("utf-8"))

    def held(self) -> bool:
        """Is the host agent that has it still there?"""
        return self.owner is not None and is_alive(self.owner)

    def owner_pid(self) -> int:
        return int(self.owner[0]) if self.owner is not None else 0
