"""Reading job.xml in a process of its own, which ends before the job begins.

So the XML library (6 MB) stays out of the wrapper's memory, which is resident for as long as the job runs.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

from .job import Job, JobError, load_job


def load_job_apart(path: Path) -> Job:
    """`load_job` in a child; here where there is no fork. Raises JobError."""
    if not hasattr(os, "fork"):
        return load_job(path)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _answer(path, write_end)
        finally:
            os._exit(1)
    os.close(write_end)
    with open(read_end, "rb") as pipe:  # noqa: PTH123 - a descriptor
        data = pipe.read()
    os.waitpid(pid, 0)
    if not data:
        raise JobError(path.name, 0, "could not be read: the process that reads it ended", "is there enough memory?")
    answer = pickle.loads(data)  # noqa: S301 - our own fork's
    if isinstance(answer, Job):
        return answer
    raise JobError.again(*answer)


def _answer(path: Path, pipe: int) -> None:
    answer: object
    try:
        answer = load_job(path)
    except JobError as error:
        answer = (str(error), error.hint, error.file, error.line, error.tag)
    except Exception as error:  # the parent has no other way to hear of it
        sys.stderr.write(f"job.xml could not be read: {error!r}\n")
        return
    with open(pipe, "wb") as file:
        pickle.dump(answer, file)
