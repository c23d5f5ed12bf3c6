"""What an agent stands on before it has settings: its journal, its keeper, its way to count.

A template is taken of a machine whose agent waits for its settings with all of this in place: what is done here is
done once, and not by each of its clones, in which an emulated processor has everything to translate anew.
"""

from __future__ import annotations

import codecs
import socket
import time
from pathlib import Path

import attrs

from common.files import GUEST_JOURNAL, GUEST_STATE
from common.messages import Beacon, Envelope, Hello, decode, encode, proof_of

from .accounting import Accounts, accounts
from .journal import Journal
from .keeper_socket import ATTEMPTS, PAUSE


@attrs.define
class Ground:
    """`keeper` is a connection that nobody has read from; without one the agent makes its own."""

    journal: Journal
    accounts: Accounts
    keeper: socket.socket | None = None

    @classmethod
    def of(cls, home: Path, keeper: socket.socket | None = None) -> Ground:
        return cls(Journal(home / GUEST_STATE / GUEST_JOURNAL), accounts(), keeper)


def connect_keeper(path: Path) -> socket.socket | None:
    """Wait for the keeper that was just started, and connect to it; None when it does not come."""
    keeper = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    for _ in range(ATTEMPTS):
        try:
            keeper.connect(str(path))
            return keeper
        except OSError:
            time.sleep(PAUSE)
    keeper.close()
    return None


def rehearse() -> None:
    """Say the first words once to nobody: what they need is loaded then."""
    codecs.lookup("ascii")
    hello = Hello("g", "b", proof_of("", "g", "s"), "")
    for message in (hello, Beacon("g", 0.0)):
        decode(encode(Envelope(message, "s", "")))
