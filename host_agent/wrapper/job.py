"""What a job.xml says, as values: a `Job` and its `Task`s. `docs/job-xml.md` explains every tag.

This module imports no XML library: the values outlive the parser (`job_parse.py`), which is imported only
while a file is read.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common.errors import ConfigError


class JobError(ConfigError):
    """A job.xml that cannot be run as it is: one sentence with the file, the line and the tag."""

    def __init__(self, file: str, line: int, text: str, hint: str = "", tag: str = "") -> None:
        super().__init__(f"{file}:{line}: {text}" if line else f"{file}: {text}", hint)
        self.file = file
        self.line = line
        self.tag = tag

    @classmethod
    def again(cls, sentence: str, hint: str, file: str, line: int, tag: str) -> JobError:
        """An error that another process had."""
        error = cls(file, line, "", hint, tag)
        error.args = (sentence,)
        return error


class TaskKind(enum.Enum):
    """The three kinds of task of a job; the value is the tag."""

    UNZIP = "unzip_task"  # before everything else, once in the life of a slot
    MANAGE = "VMmanage_task"  # beside the tasks, when one of them uses a virtual machine
    TASK = "task"  # one after another


class Task(NamedTuple):
    """One task as the file describes it: names are not yet resolved, macros not yet substituted."""

    kind: TaskKind
    line: int  # of its opening tag
    number: int  # among its kind, from 1
    application: str
    virtualmachine: str = ""  # empty: the task runs on the host
    parallel_group: str = ""  # neighbours with the same one run at once; empty: alone
    image: str = ""
    memory_mb: int = 0  # 0: the image's own
    cpus: int = 0  # 0: the host agent's default
    network: bool = False  # the VM gets a way out
    copy_app_to_vm: bool = False
    copy_stdin_to_vm: bool = False
    copy_files_to_vm: tuple[str, ...] = ()
    copy_files_from_vm: tuple[str, ...] = ()
    stdin_filename: str = ""
    stdout_filename: str = ""
    stderr_filename: str = ""
    checkpoint_filename: str = ""
    fraction_done_filename: str = ""
    command_line: str = ""
    weight: float = 1.0
    exec_dir: str = ""
    setenv: tuple[str, ...] = ()  # "NAME=VALUE"
    daemon: bool = False
    append_cmdline_args: bool = False
    multi_process: bool = False
    forward_slashes: bool = False
    time_limit: float = 0.0  # seconds; 0: none
    no_checkpoints: bool = False  # of a VM while it runs
    priority: int = 0  # 1 (lowest) to 5; 0: not given

    @property
    def in_vm(self) -> bool:
        """Whether it runs inside a virtual machine."""
        return bool(self.virtualmachine)

    @property
    def title(self) -> str:
        """How messages name it: `task 2 (./worker.py in CernVM)`."""
        where = f" in {self.virtualmachine}" if self.in_vm else ""
        name = "daemon" if self.daemon else self.kind.value
        return f"{name} {self.number} ({self.application}{where})"


class ZipOutput(NamedTuple):
    """BOINC's `zip_output`: which new files of the slot go into which archive at the end."""

    zipfilename: str
    patterns: tuple[str, ...]  # regular expressions, searched in the file's name


class Job(NamedTuple):
    """A whole job.xml."""

    path: Path
    unzip_tasks: tuple[Task, ...]
    manage_tasks: tuple[Task, ...]
    tasks: tuple[Task, ...]
    daemons: tuple[Task, ...]
    unzip_input: tuple[str, ...]
    zip_output: ZipOutput | None
    enable_graphics_support: bool
    checkpoint_period: float | None  # seconds, at least, between two checkpoints of a task in a VM; None: not given
    warnings: tuple[str, ...]

    @property
    def uses_vm(self) -> bool:
        """Whether any task runs in a virtual machine."""
        return any(task.in_vm for task in self.tasks)

    def steps(self, done: int = 0) -> Iterator[tuple[Task, ...]]:
        """What is left after the first `done` tasks: one task after another, those of a parallel group together."""
        rest = self.tasks[done:]
        for _, tasks in itertools.groupby(rest, key=lambda task: task.parallel_group or task.number):
            yield tuple(tasks)

    @property
    def total_weight(self) -> float:
        """Sum of the weights of the tasks; always above 0."""
        return sum(task.weight for task in self.tasks)

    def error(self, task: Task, text: str, hint: str = "", tag: str = "") -> JobError:
        """An error that points at a task of this job."""
        return JobError(self.path.name, task.line, text, hint, tag)


def load_job(path: Path, strict: bool = False) -> Job:
    """Read a job.xml. Raises JobError; with `strict`, what is otherwise a warning is an error too."""
    from .job_parse import parse_job, read_capped

    return parse_job(read_capped(path), path, strict)
