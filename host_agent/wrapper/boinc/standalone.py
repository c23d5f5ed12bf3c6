"""Running without a BOINC client: the same files in the slot, nobody to talk to."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint import write_atomically
from ..resolve import resolve_name
from .runtime import InitData, Status

FINISH_FILE = "boinc_finish_called"
TEMPORARY_EXIT_FILE = "boinc_temporary_exit"


class StandaloneRuntime:
    """A `Runtime` for a slot without a client."""

    def __init__(self, slot: Path) -> None:
        self._slot = slot

    def init(self) -> InitData:
        for name in (FINISH_FILE, TEMPORARY_EXIT_FILE):
            (self._slot / name).unlink(missing_ok=True)
        return InitData(standalone=True)

    def poll(self) -> Status:
        return Status()

    def report(self, cpu_s: float, checkpoint_cpu_s: float, fraction: float) -> None:
        pass

    def time_to_checkpoint(self) -> bool:
        return True

    def checkpoint_completed(self) -> None:
        pass

    def resolve(self, name: str) -> str:
        return resolve_name(self._slot, name)

    def send_trickle_up(self, variety: str, text: str) -> None:
        pass

    def finish(self, status: int, message: str = "") -> int:
        note = f"{message}\nno\n" if message else ""
        write_atomically(self._slot / FINISH_FILE, f"{status}\n{note}")
        return status

    def temporary_exit(self, delay_s: int, reason: str) -> int:
        write_atomically(self._slot / TEMPORARY_EXIT_FILE, f"{delay_s}\n{reason}\n")
        return 0
