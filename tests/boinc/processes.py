"""Which processes work in a slot."""

from __future__ import annotations

from pathlib import Path

import psutil

WRAPPER = "host_agent.wrapper.main"
TASK = "work_100.sh"


def processes(slot: Path, program: str) -> list[psutil.Process]:
    """Those with `program` in one of their words."""
    return [
        each
        for each in psutil.process_iter(["cmdline", "cwd", "ppid"])
        if each.info["cwd"] == str(slot) and any(program in word for word in each.info["cmdline"] or [])
    ]
