"""The texts of the channels: what the client says to us and we to it.

They look like XML and are none: a message is a few tags one after another, looked for by name.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_BEATS = re.compile(r"<(wss|max_wss|sporadic_ca)>\s*([-+.0-9eE]+)\s*</\1>")


class HeartBeat(NamedTuple):
    """The client's message of every second."""

    beat: bool
    working_set: float | None = None
    max_working_set: float | None = None
    network_suspended: bool = False
    sporadic: int | None = None


def parse_heart_beat(text: str) -> HeartBeat:
    """Numbers that cannot be read are left out."""
    numbers: dict[str, float] = {}
    for name, value in _BEATS.findall(text):
        try:
            numbers[name] = float(value)
        except ValueError:
            continue
    sporadic = numbers.get("sporadic_ca")
    return HeartBeat(
        beat="<heartbeat/>" in text,
        working_set=numbers.get("wss"),
        max_working_set=numbers.get("max_wss"),
        # The client writes the first; its own library looks for the second, and so never sees it.
        network_suspended="<network_suspended/>" in text or "<suspend_network/>" in text,
        sporadic=int(sporadic) if sporadic is not None and 0 <= sporadic < 100 else None,
    )


def app_status(
    cpu_s: float,
    checkpoint_cpu_s: float,
    fraction: float,
    *,
    working_set: float,
    other_pid: int,
    bytes_sent: float,
    bytes_received: float,
    want_network: bool,
    sporadic: int,
) -> str:
    """How far we are; what is 0 or not wanted is left out, as the client expects."""
    lines = [
        f"<current_cpu_time>{cpu_s:e}</current_cpu_time>",
        f"<checkpoint_cpu_time>{checkpoint_cpu_s:e}</checkpoint_cpu_time>",
    ]
    if want_network:
        lines.append("<want_network>1</want_network>")
    lines.append(f"<fraction_done>{fraction:e}</fraction_done>")
    if other_pid:
        lines.append(f"<other_pid>{other_pid}</other_pid>")
    if bytes_sent:
        lines.append(f"<bytes_sent>{bytes_sent:f}</bytes_sent>")
    if bytes_received:
        lines.append(f"<bytes_received>{bytes_received:f}</bytes_received>")
    if working_set:
        lines.append(f"<wss>{working_set:f}</wss>")
    if sporadic:
        lines.append(f"<sporadic_ac>{sporadic}</sporadic_ac>")
    return "\n".join(lines) + "\n"
