"""`graphics_status.xml`, which a job's graphics program reads (BOINC's `boinc_parse_graphics_status`)."""

from __future__ import annotations

import time
from pathlib import Path

from .boinc.runtime import Leave, Status
from .checkpoint import write_atomically

GRAPHICS_STATUS_FILE = "graphics_status.xml"


def write_graphics_status(slot: Path, status: Status, cpu_s: float, run_time_s: float, fraction: float) -> None:
    """Say how far the job is. Written anew every second: a power cut may have it."""
    leave = status.leave
    text = (
        "<graphics_status>\n"
        f"    <updated_time>{time.time():f}</updated_time>\n"
        f"    <cpu_time>{cpu_s:f}</cpu_time>\n"
        f"    <elapsed_time>{run_time_s:f}</elapsed_time>\n"
        f"    <fraction_done>{fraction:f}</fraction_done>\n"
        "    <boinc_status>\n"
        f"        <no_heartbeat>{leave is Leave.NO_CLIENT:d}</no_heartbeat>\n"
        f"        <suspended>{status.suspended:d}</suspended>\n"
        f"        <quit_request>{leave is Leave.QUIT:d}</quit_request>\n"
        f"        <abort_request>{leave is Leave.ABORT:d}</abort_request>\n"
        f"        <network_suspended>{status.network_suspended:d}</network_suspended>\n"
        "    </boinc_status>\n"
        "</graphics_status>\n"
    )
    write_atomically(slot / GRAPHICS_STATUS_FILE, text, durable=False)
