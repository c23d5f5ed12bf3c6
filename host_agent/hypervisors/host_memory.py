"""What this host's memory allows, and what its want has cost."""

from __future__ import annotations

from pathlib import Path

import psutil

from common.cgroup import own_group

VMSTAT = Path("/proc/vmstat")


def oom_kills() -> int:
    """Processes that the system has ended since its start because memory was short; 0 where it does not say."""
    try:
        for line in VMSTAT.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    except (OSError, ValueError):
        pass
    return 0


def spare_mb(group: Path | None = None) -> int:
    """What programs can still have: of the host's memory, and of that which our control groups allow. MB."""
    free = int(psutil.virtual_memory().available)
    group = group or own_group()
    while group is not None and (group / "cgroup.procs").exists():
        try:
            most = (group / "memory.max").read_text().strip()
            if most != "max":
                free = min(free, int(most) - int((group / "memory.current").read_text()))
        except (OSError, ValueError):
            pass
        group = group.parent
    return max(0, free) >> 20
