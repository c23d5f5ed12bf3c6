"""How our own programs are started: from a checkout, from an installation, or as modes of the frozen program.

The frozen program (`frozen.py`) is `vmwrapper`; with `MODULE` as its first word it is another module of ours, and
with `SCRIPT` it is the Python for a task of the job.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

FROZEN = bool(getattr(sys, "frozen", False))
MODULE = "--vmwrapper-module"
SCRIPT = "--vmwrapper-script"
LAUNCHED = "--vmwrapper-launched"  # by the launcher of Windows, whose own path follows (`bundle/launcher.py`)
_FIRST_LINE = 128


def module_argv(module: str) -> list[str]:
    """Starts a module of ours as a program."""
    if FROZEN:
        return [sys.executable, MODULE, module]
    # -P: the current directory may be a slot, and its files must not pass for modules of ours.
    return [sys.executable, "-P", "-m", module]


def lean_argv(path: Path, module: str) -> list[str]:
    """Starts a module that needs the standard library alone, by its path: nothing else is looked for."""
    return [sys.executable, MODULE, module] if FROZEN else [sys.executable, "-I", "-S", str(path)]


def script_argv(program: str) -> list[str] | None:
    """How to run a job's Python script with our Python; None when it is no such thing, or its own is meant.

    A frozen wrapper is on a host that may have no Python, and Windows does not read first lines.
    """
    if not FROZEN and os.name != "nt":
        return None
    try:
        with open(program, "rb") as file:  # noqa: PTH123 - a host-only job does without pathlib here
            line = file.read(_FIRST_LINE).partition(b"\n")[0]
    except OSError:
        return None
    if not (line.startswith(b"#!") and b"python" in line) and not program.lower().endswith(".py"):
        return None
    return [sys.executable, SCRIPT, program] if FROZEN else [sys.executable, program]
