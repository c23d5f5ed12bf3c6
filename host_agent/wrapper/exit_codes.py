"""The exit statuses of `vmwrapper`, by BOINC's names and numbers, with the sentence that explains each."""

from __future__ import annotations

import enum


class Exit(enum.IntEnum):
    """Exit status of the wrapper, and what `boinc_finish_called` holds when that file is written."""

    DONE = 0
    """Every task ended with 0 (finish file written), or we were told to quit (no finish file)."""
    CHILD_FAILED = 195
    """A task's own program failed."""
    INIT_FAILURE = 206
    """Nothing was started: a wrong option, or a job.xml that cannot be run."""
    SUB_TASK_FAILURE = 208
    """A task could not be run or its results could not be had: the VM, a copy or the host agent failed."""


SENTENCES = {
    Exit.DONE: "the job is done, or the client asked us to quit",
    Exit.CHILD_FAILED: "a task's program failed",
    Exit.INIT_FAILURE: "a wrong option or a wrong job.xml; nothing was started",
    Exit.SUB_TASK_FAILURE: "a virtual machine, a copy or the host agent failed",
}
