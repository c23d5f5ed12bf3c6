"""The application side of the BOINC client's protocol, for VMwrapper and other BOINC applications in Python.

    runtime = connect(Path.cwd())
    data = runtime.init()

`docs/boinc-api.md` describes it; `application.run` is what a program needs that computes in steps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .runtime import Runtime


def connect(slot: Path, say: Callable[[str], None] | None = None) -> Runtime:
    """The runtime for a slot: with the client that prepared it, or without one. `say`: where a line for a person goes.

    Nothing is read or locked before `init()`.
    """
    from .slot_files import INIT_DATA_FILE

    if (slot / INIT_DATA_FILE).exists():
        from .client import ClientRuntime

        return ClientRuntime(slot, say) if say else ClientRuntime(slot)
    from .standalone import StandaloneRuntime

    return StandaloneRuntime(slot)
