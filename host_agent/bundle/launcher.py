"""The main program of an application version: starts the frozen wrapper that the client has put into the slot.

A client starts an application where the project's files are, under names of its own choice. The wrapper's libraries
have to be beside it under theirs, and are, in the slot. So the main program is this,
and the wrapper is among the files.
"""

from __future__ import annotations

from .freeze import PROGRAM

DIRECTORY = "vmwrapper"  # of the frozen program in the slot

POSIX = f"""#!/bin/sh
# BOINC starts this in a slot; the wrapper is there, with its libraries beside it.
exec ./{DIRECTORY}/{PROGRAM} "$@"
""".encode("ascii")
