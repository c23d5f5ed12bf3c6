"""The interface between the wrapper and whoever started it: a BOINC client, or nobody (`standalone.py`)."""

from __future__ import annotations

from typing import Protocol

import attrs


@attrs.frozen
class InitData:
    """What the client tells its application once, at the start."""

    standalone: bool = True
    project_dir: str = "."
    gpu_device: int = -1  # below 0: not given
    process_priority: int = 0  # the client's wish, 1 to 5; 0: none, the job's counts


@attrs.frozen
class Status:
    """What the client wants right now."""

    suspended: bool = False
    quit_reason: str = ""  # not empty: end everything and exit without a finish file, to be started again


class Runtime(Protocol):
    """The application side of the BOINC client's protocol. No method waits."""

    def init(self) -> InitData:
        """Once, before everything else."""

    def poll(self) -> Status:
        """Read what the client wrote since the last time."""

    def report(self, cpu_s: float, checkpoint_cpu_s: float, fraction: float) -> None:
        """Tell the client how far we are."""

    def time_to_checkpoint(self) -> bool:
        """Whether the client's interval between checkpoints is over."""

    def checkpoint_completed(self) -> None:
        """A checkpoint was written just now."""

    def resolve(self, name: str) -> str:
        """The path behind a file's name in the slot."""

    def send_trickle_up(self, variety: str, text: str) -> None:
        """Send a message to the project."""

    def finish(self, status: int, message: str = "") -> int:
        """The job is over: write the finish file. Returns the status to exit with."""

    def temporary_exit(self, delay_s: int, reason: str) -> int:
        """Ask to be started again after a while. Returns the status to exit with."""
