"""What a task in a virtual machine needs from the slot."""

from __future__ import annotations

from pathlib import Path

from .job import Task
from .resolve import resolve_path
from .tasks import TaskError


def guest_inputs(task: Task) -> list[tuple[str, str]]:
    """What is copied into the VM before a task: names in the slot and in the guest's home."""
    inputs = [(task.application, basename(task.application))] if task.copy_app_to_vm else []
    inputs += [(name, name) for name in task.copy_files_to_vm]
    stdin = task.stdin_filename
    if stdin and task.copy_stdin_to_vm and stdin not in task.copy_files_to_vm:
        inputs.append((stdin, stdin))
    return inputs


def check_files(task: Task, slot: Path) -> None:
    """The files of a guest task that must be in the slot when it starts. Raises TaskError."""
    for name, _there in guest_inputs(task):
        if not resolve_path(slot, name).exists():
            raise TaskError(
                f"{task.title}: there is no {name!r} in the slot to copy into the VM", f"the slot is {slot}"
            )


def basename(name: str) -> str:
    """The last part of a path, whichever slashes it has."""
    return name.replace("\\", "/").rpartition("/")[2]
