"""`--sporadic`: a task that computes only now and then speaks with the client through two files of the slot.

`ca` (client to application) and `ac` (application to client) each hold one number, as BOINC's wrapper has it.
"""

from __future__ import annotations

import os
from pathlib import Path

from .boinc.runtime import Runtime, SporadicApp, SporadicClient, Status

TO_APP_FILE = "ca"
FROM_APP_FILE = "ac"


class SporadicFiles:
    """Copies the two states, once a second."""

    def __init__(self, slot: Path, runtime: Runtime) -> None:
        self._to_app, self._from_app = slot / TO_APP_FILE, slot / FROM_APP_FILE
        self._runtime = runtime
        self._told: SporadicClient | None = None
        self._heard = SporadicApp.NONE
        self._from_app.touch()

    def tick(self, status: Status) -> None:
        """Look, and copy what has changed."""
        # Until the client has said something, the application may not compute.
        state = status.sporadic if status.sporadic is not SporadicClient.NONE else SporadicClient.DONT_COMPUTE
        if state is not self._told:
            self._told = state
            self._tell(f"{state.value}\n")
        try:
            heard = SporadicApp(int(self._from_app.read_text("ascii")[:16]))
        except (OSError, ValueError):
            return  # it is just being written
        if heard is not self._heard:
            self._heard = heard
            self._runtime.sporadic(heard)

    def _tell(self, text: str) -> None:
        # In place, one write: the task may keep the file open.
        descriptor = os.open(self._to_app, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, text.encode("ascii"))
            os.ftruncate(descriptor, len(text))
        finally:
            os.close(descriptor)
