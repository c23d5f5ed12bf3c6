"""Which process is meant: a number alone may be somebody else's by now, and clocks are set anew.

On Linux a process is known by the boot and the clock ticks from there to its beginning, which do not move when somebody
sets the computer's clock; psutil's time of creation does, because it is reckoned from the present time.
"""

from __future__ import annotations

from typing import Any

from .wrapper.process_tree import PROC, read_stat, stat_of

Identity = list[Any]  # [number, when it began]; as JSON, in files that another process reads


def identity_of(pid: int) -> Identity:
    """A process; one that is not there is nobody's identity later either."""
    if mark := start_mark(pid):
        return [pid, mark]
    import psutil  # a wrapper on Linux does without

    try:
        return [pid, psutil.Process(pid).create_time()]
    except psutil.Error:
        return [pid, 0.0]


def is_alive(identity: Identity) -> bool:
    """Whether that process is still there. True when it cannot be told: what is not provably dead is left alone."""
    pid, began = identity
    if not began:
        return False  # nobody
    if not isinstance(began, str):
        return _is_alive_by_time(pid, began)
    boot = boot_id()
    if boot and not began.startswith(f"{boot}:"):
        return False
    try:
        found = stat_of(pid)
    except (FileNotFoundError, ProcessLookupError):
        return not (PROC / "self").exists()
    except (OSError, IndexError, ValueError):
        return True
    return found.alive and began == f"{boot}:{found.start}"


def start_mark(pid: int) -> str:
    """Something that tells this process from a later one with the same number; empty where there is no /proc."""
    found, boot = read_stat(pid), boot_id()
    return f"{boot}:{found.start}" if boot and found is not None and found.alive else ""


def same_boot(mark: str) -> bool:
    """Whether a mark was made since this computer was started."""
    return bool(mark) and mark.partition(":")[0] == boot_id()


def boot_id() -> str:
    """The name of this start of the computer; empty where the system gives it none."""
    try:
        return (PROC / "sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


def _is_alive_by_time(pid: int, began: float) -> bool:
    import psutil

    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - began) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
