"""The main program of an application version: starts the frozen wrapper that the client has put into the slot.

A client starts an application where the project's files are, under names of its own choice. The wrapper's libraries
have to be beside it under theirs, and are, in the slot. So the main program is this,
and the wrapper is among the files.
"""

from __future__ import annotations

import io
import zipfile
from importlib.resources import files

from common.errors import ConfigError
from host_agent.programs import LAUNCHED

from .freeze import PROGRAM

EXTRA = "pip install 'vmwrapper[bundle]'"
DIRECTORY = "vmwrapper"  # of the frozen program in the slot
# Of BOINC's API that the wrapper's runtime speaks; without one a client makes no shared memory. Projects with an
# old server do not read it in version.xml, but look for these letters in the main program.
API_VERSION = "8.0.0"
_LETTERS = f"# API_VERSION_{API_VERSION}\n"

POSIX = f"""#!/bin/sh
# BOINC starts this in a slot; the wrapper is there, with its libraries beside it.
{_LETTERS}exec ./{DIRECTORY}/{PROGRAM} "$@"
""".encode("ascii")


def windows() -> bytes:
    """distlib's launcher without a console: it starts what its `#!` line names, and ends it when it is ended itself."""
    try:
        program = files("distlib").joinpath("w64.exe").read_bytes()
    except (ModuleNotFoundError, OSError):
        raise ConfigError("the launcher for Windows is part of distlib, which is not installed", EXTRA) from None
    end = io.BytesIO()
    with zipfile.ZipFile(end, "w") as archive:  # by which the launcher finds the line before it
        archive.writestr(zipfile.ZipInfo("__main__.py"), _LETTERS)
    line = f"#!.\\{DIRECTORY}\\{PROGRAM}.exe {LAUNCHED}\r\n".encode("ascii")
    return program + line + end.getvalue()
