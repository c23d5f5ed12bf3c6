"""What the client's preferences and the state of its network mean for the job's virtual machines.

**Who holds a job to its share of the processors?** The client itself, by suspending it for part of each few seconds,
unless the application version's plan class has `vbox` in it, uses a GPU or less than one processor: those it leaves
alone. For them we tell the host agent, whose cap is finer and costs less than pausing a VM. Never both: half of half is
a quarter.
"""

from __future__ import annotations

from typing import NamedTuple

from .boinc.runtime import InitData, Status

OF_DISK_BOUND = 0.9  # at all of it the client aborts the job
_MB = 1 << 20


class VmLimits(NamedTuple):
    """Arguments of `limit_vm`."""

    cpu_percent: float = 0.0  # 0: no limit
    disk_mb: int = 0
    network: bool = False
    up_bytes_s: float = 0.0  # that may be sent to the network; 0: no limit
    down_bytes_s: float = 0.0


class VmWishes:
    """The present ones."""

    def __init__(self) -> None:
        self.limits = VmLimits()

    def of(self, network: bool) -> VmLimits:
        """Those of a VM that may use the network, or may not."""
        return self.limits._replace(network=self.limits.network and network)

    def follow_network(self, status: Status) -> None:
        """The client's network, as it is just now."""
        self.limits = self.limits._replace(network=not status.network_suspended)

    def follow(self, given: InitData) -> None:
        """The client's settings, at the start and whenever they change."""
        percent = given.preferences.cpu_usage_percent
        ours = "vbox" in given.plan_class or bool(given.gpu_type) or 0 < given.ncpus < 1
        self.limits = self.limits._replace(
            cpu_percent=percent if ours and 0 < percent < 100 else 0.0,
            disk_mb=int(given.disk_bound * OF_DISK_BOUND) // _MB,
            up_bytes_s=given.preferences.max_bytes_up_s,
            down_bytes_s=given.preferences.max_bytes_down_s,
        )
