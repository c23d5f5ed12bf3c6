"""CPU time of a VM's process, which can still be asked for after the process has ended."""

from __future__ import annotations

import psutil


class CpuTime:
    """The last CPU time that was seen, in seconds, user and system."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def look(self, pid: int | None) -> float:
        """Bring it up to date while the process is there."""
        if pid is not None:
            try:
                times = psutil.Process(pid).cpu_times()
                self.seconds = times.user + times.system
            except psutil.Error:
                pass  # it ended at this moment: what was seen last stands
        return self.seconds
