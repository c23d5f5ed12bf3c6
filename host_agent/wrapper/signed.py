"""Whether the programs that a job starts on the host are signed by the project.

The client checks the signatures of an application version's files when it downloads them, and tells us their names.
A job may start such a file, or a copy of one. What its job.xml may start besides depends on who wrote that:
when job.xml is itself such a file, its word is the project's; when it came with the job, anybody who can add jobs to
the project's server could otherwise run any program on all volunteers' computers.
Programs in a virtual machine are not looked at: the machine is there so that they need not be trusted.
"""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterable
from pathlib import Path

from .boinc.runtime import InitData
from .job import Job, JobError, Task
from .resolve import Macros, application_path, soft_link_target


class SignedFiles:
    """The application version's files; none when the client did not say (then nothing can be checked)."""

    def __init__(self, slot: Path, project_dir: Path, names: frozenset[str]) -> None:
        self.slot = slot
        self.project_dir = project_dir
        self.names = names

    @classmethod
    def of(cls, slot: Path, given: InitData) -> SignedFiles:
        return cls(slot, Path(given.project_dir), frozenset(given.app_files))

    def __contains__(self, path: Path) -> bool:
        """Whether a file is one of them, leads to one, or is a copy of one."""
        target = soft_link_target(path)
        if target is not None:
            return self._is_listed(self.slot / target)
        return self._is_listed(path) or (path.is_file() and any(_same(path, each) for each in self._paths()))

    def _is_listed(self, path: Path) -> bool:
        real = Path(os.path.realpath(path))
        return real.name in self.names and real.parent == Path(os.path.realpath(self.project_dir))

    def _paths(self) -> Iterable[Path]:
        return (self.project_dir / name for name in sorted(self.names))


def _same(one: Path, other: Path) -> bool:
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


def check_programs(job: Job, signed: SignedFiles, macros: Macros) -> None:
    """Raises JobError for the first program on the host that the job may not start."""
    if not signed.names or job.path in signed:
        return
    for task in (*job.unzip_tasks, *job.manage_tasks, *job.daemons, *job.tasks):
        if task.in_vm:
            continue
        path = _program(task, signed.slot, macros)
        if path is None or path not in signed:
            raise _not_signed(job, task)


def _program(task: Task, slot: Path, macros: Macros) -> Path | None:
    """The file that a task names, before its link is followed."""
    named = slot / macros.expand(task.application)
    return named if named.is_file() else application_path(task, slot, macros)


def _not_signed(job: Job, task: Task) -> JobError:
    return job.error(
        task,
        f"{task.title}: {task.application!r} is not a signed file of the application version",
        "add the program to the application version, or job.xml itself, so that the project has signed what it starts",
        "application",
    )
