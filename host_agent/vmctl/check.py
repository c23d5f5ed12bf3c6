"""`vmctl check`: is this job in order, and what would run where? Runs nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import VMwrapperError
from common.files import JOB_FILE

from ..wrapper import guest_files, host_task
from ..wrapper.agent_process import gives_host_agent
from ..wrapper.job import Job, Task, load_job
from ..wrapper.resolve import Macros
from ..wrapper.tasks import TaskError


def add_parser(subparsers: Any) -> None:
    """Add `check` to vmctl's subcommands; it sets `func`."""
    parser = subparsers.add_parser(
        "check",
        help="is this job in order, and what would run where?",
        description="Reads a job.xml as vmwrapper does, says what is wrong with it, and shows what would run where.",
    )
    parser.add_argument("job", nargs="?", type=Path, default=Path(JOB_FILE), help="default: %(default)s")
    parser.add_argument("--strict", action="store_true", help="unknown tags and other warnings are errors")
    parser.add_argument("--slot", type=Path, help="where the job's files are (default: the job's directory)")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """0: the job is in order; 1: it is not, and standard error says why."""
    try:
        job = load_job(args.job, args.strict)
        slot = (args.slot or args.job.parent).resolve()
        if not slot.is_dir():
            raise VMwrapperError(f"{slot} is not a directory")
    except VMwrapperError as error:
        sys.stderr.write(f"{error.explain()}\n")
        return 1
    for warning in job.warnings:
        sys.stderr.write(f"warning: {warning}\n")
    sys.stdout.write(plan(job))
    missing, later = missing_files(job, slot)
    for sentence in later:
        sys.stderr.write(f"note: {sentence}\n")
    for sentence in missing:
        sys.stderr.write(f"{sentence}\n")
    if missing:
        return 1
    sys.stdout.write(f"{job.path.name} is in order.\n")
    return 0


def plan(job: Job) -> str:
    """What would run, in order, as a plain table."""
    rows = [("when", "where", "what", "weight", "files")]
    rows += [("first", "host", f"unpack {name}", "", "") for name in job.unzip_input]
    rows += [_row("first", task) for task in job.unzip_tasks]
    rows += [_row("beside", task) for task in job.daemons]
    if job.uses_vm:
        rows += [_row("beside", task) for task in job.manage_tasks]
        if not any(gives_host_agent(task) for task in job.manage_tasks):
            rows.append(("beside", "host", "the host agent", "", ""))
    total = job.total_weight
    rows += [_row(f"task {task.number}", task, f"{task.weight:g} ({task.weight / total:.0%})") for task in job.tasks]
    if job.zip_output:
        rows.append(("last", "host", f"pack {job.zip_output.zipfilename}", "", " ".join(job.zip_output.patterns)))
    text = "".join(f"{line}\n" for line in _table(rows))
    if job.manage_tasks and not job.uses_vm:
        text += "The VMmanage tasks are not started: no task names a virtual machine.\n"
    return text


def missing_files(job: Job, slot: Path) -> tuple[list[str], list[str]]:
    """Sentences about files that are not in the slot: certainly missing, and perhaps made by an earlier task."""
    missing: list[str] = []
    later = [
        f"{job.path.name}: there is no {name} to unpack; it is left out"
        for name in job.unzip_input
        if not (slot / name).exists()
    ]
    archives = bool(job.unzip_input)
    beside = (*job.daemons, *(job.manage_tasks if job.uses_vm else ()))
    for position, task in enumerate((*job.unzip_tasks, *beside, *job.tasks)):
        try:
            _check(task, slot)
        except TaskError as error:
            sentence = f"{job.path.name}:{task.line}: {error}"
            if position or archives:
                later.append(f"{sentence}; an earlier task must make it")
            else:
                missing.append(sentence)
    return missing, later


def _check(task: Task, slot: Path) -> None:
    if task.in_vm:
        guest_files.check_files(task, slot)
    else:
        host_task.check_files(task, slot, Macros(slot=str(slot)))


def _row(when: str, task: Task, weight: str = "") -> tuple[str, str, str, str, str]:
    where = task.virtualmachine or "host"
    if task.image:
        where += f" ({task.image})"
    return when, where, f"{task.application} {task.command_line}".strip(), weight, ", ".join(_files(task))


def _files(task: Task) -> Iterator[str]:
    if task.in_vm:
        yield from (f"{name} → VM" for name, _there in guest_files.guest_inputs(task))
        yield from (f"{name} ← VM" for name in task.copy_files_from_vm)
    if task.stdin_filename:
        yield f"< {task.stdin_filename}"
    if task.stdout_filename:
        yield f"> {task.stdout_filename}"
    if task.stderr_filename:
        yield f"2> {task.stderr_filename}"


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Columns of equal width; long command lines are cut in the middle columns, never the files."""
    cut = [tuple(_short(cell) if index == 2 else cell for index, cell in enumerate(row)) for row in rows]
    widths = [max(len(row[index]) for row in cut) for index in range(len(rows[0]))]
    for row in cut:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 50 else f"{line[:49]}…"
