"""How `vmwrapper` ends: one table of exit statuses, by BOINC's names and numbers (`docs/exit-codes.md` explains it)."""

from __future__ import annotations

import enum


class Exit(enum.IntEnum):
    """Exit status of the wrapper, and what `boinc_finish_called` holds when that file is written."""

    DONE = 0
    CHILD_FAILED = 195
    UNKNOWN = 204
    OUT_OF_MEMORY = 205
    INIT_FAILURE = 206
    SUB_TASK_FAILURE = 208

    @property
    def boinc_name(self) -> str:
        """The name in BOINC's `error_numbers.h`."""
        return "BOINC_SUCCESS" if self is Exit.DONE else f"EXIT_{self.name}"


SENTENCES = {
    Exit.DONE: "The job is done.",
    Exit.CHILD_FAILED: "A program of the project ended with an error; its last lines are above.",
    Exit.UNKNOWN: "vmwrapper itself failed in a way that its makers did not think of; please report the lines above.",
    Exit.OUT_OF_MEMORY: "This computer's memory did not suffice, although it was tried again for hours.",
    Exit.INIT_FAILURE: "The job is wrong: its job.xml, an option or a file of it. Nothing was computed.",
    Exit.SUB_TASK_FAILURE: "A virtual machine, a copy of files or the host agent failed, and not only for a moment.",
}
