"""The tags of a job.xml: one table, from which the parser reads and against which schema and docs are tested."""

from __future__ import annotations

import enum
import math
import re
from typing import NamedTuple


class Type(enum.Enum):
    """What may stand in a tag."""

    TEXT = "text"
    FILE = "file name"  # inside the slot: relative, no ".."
    ENV = "NAME=VALUE"
    BOOL = "boolean"  # BOINC's: the empty tag means yes
    SEED_BOOL = "1 or 0"  # the seed's: the empty tag means not set
    ABOVE_0 = "number above 0"
    SECONDS = "number of seconds"
    COUNT = "whole number"
    PRIORITY = "0 to 5"


class Tag(NamedTuple):
    """One tag of a task: its name in the file, the `Task` field it fills, and what it holds."""

    name: str
    field: str
    type: Type
    repeated: bool = False
    vm_only: bool = False


TASK_TAGS = {
    tag.name: tag
    for tag in (
        Tag("virtualmachine", "virtualmachine", Type.TEXT, vm_only=True),
        Tag("parallel_group", "parallel_group", Type.TEXT),
        Tag("image", "image", Type.TEXT, vm_only=True),
        Tag("memory_mb", "memory_mb", Type.COUNT, vm_only=True),
        Tag("cpus", "cpus", Type.COUNT, vm_only=True),
        Tag("network", "network", Type.BOOL, vm_only=True),
        Tag("application", "application", Type.TEXT),
        Tag("copy_app_to_VM", "copy_app_to_vm", Type.SEED_BOOL, vm_only=True),
        Tag("copy_stdin_to_VM", "copy_stdin_to_vm", Type.SEED_BOOL, vm_only=True),
        Tag("copy_file_to_VM", "copy_files_to_vm", Type.FILE, repeated=True, vm_only=True),
        Tag("copy_file_from_VM", "copy_files_from_vm", Type.FILE, repeated=True, vm_only=True),
        Tag("stdin_filename", "stdin_filename", Type.FILE),
        Tag("stdout_filename", "stdout_filename", Type.FILE),
        Tag("stderr_filename", "stderr_filename", Type.FILE),
        Tag("checkpoint_filename", "checkpoint_filename", Type.FILE),
        Tag("no_checkpoints", "no_checkpoints", Type.BOOL, vm_only=True),
        Tag("fraction_done_filename", "fraction_done_filename", Type.FILE),
        Tag("command_line", "command_line", Type.TEXT),
        Tag("weight", "weight", Type.ABOVE_0),
        Tag("exec_dir", "exec_dir", Type.TEXT),
        Tag("setenv", "setenv", Type.ENV, repeated=True),
        Tag("daemon", "daemon", Type.BOOL),
        Tag("append_cmdline_args", "append_cmdline_args", Type.BOOL),
        Tag("multi_process", "multi_process", Type.BOOL),
        Tag("forward_slashes", "forward_slashes", Type.BOOL),
        Tag("time_limit", "time_limit", Type.SECONDS),
        Tag("priority", "priority", Type.PRIORITY),
    )
}

ROOT = "job_desc"
TASK_KINDS = ("unzip_task", "VMmanage_task", "task")
JOB_TAGS = (*TASK_KINDS, "unzip_input", "zip_output", "enable_graphics_support", "checkpoint_period")
ZIP_TAGS = {"unzip_input": ("zipfilename",), "zip_output": ("zipfilename", "filename")}

_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,2})?")
_COUNT = re.compile(r"\+?[0-9]{1,7}")
_ENV = re.compile(r"[^=\s]+=.*", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_BOOLS = {"1": True, "0": False, "true": True, "false": False}


class WrongValueError(ValueError):
    """The text of a tag is not what the tag holds; `str(error)` continues the sentence `<tag> …`."""


def convert(type_: Type, text: str) -> object:
    """The value of a tag's stripped text, or WrongValueError. Only booleans may be empty here."""
    if type_ in (Type.BOOL, Type.SEED_BOOL):
        if not text:
            return type_ is Type.BOOL
        if text not in _BOOLS:
            raise WrongValueError(f"must be 1 or 0, not {quoted(text)}")
        return _BOOLS[text]
    if type_ in (Type.ABOVE_0, Type.SECONDS):
        number = float(text) if _NUMBER.fullmatch(text) else math.nan
        if type_ is Type.ABOVE_0 and not number > 0:
            raise WrongValueError(f"must be a number above 0, not {quoted(text)}")
        if not number >= 0:
            raise WrongValueError(f"must be a number of seconds, 0 or more, not {quoted(text)}")
        return number
    if type_ is Type.COUNT:
        if not _COUNT.fullmatch(text):
            raise WrongValueError(f"must be a whole number, 0 or more, not {quoted(text)}")
        return int(text)
    if type_ is Type.PRIORITY:
        if text not in ("0", "1", "2", "3", "4", "5"):
            raise WrongValueError(f"must be 1 (lowest) to 5 (highest), or 0 (not given), not {quoted(text)}")
        return int(text)
    if type_ is Type.ENV:
        if not _ENV.fullmatch(text):
            raise WrongValueError(f"must be NAME=VALUE, not {quoted(text)}")
        return text
    return slot_name(text) if type_ is Type.FILE else text


def slot_name(text: str) -> str:
    """A file's name inside the slot, without a leading `./`."""
    if _CONTROL.search(text):
        raise WrongValueError("must be a file name on one line, without control characters")
    parts = [part for part in text.replace("\\", "/").split("/") if part not in ("", ".")]
    if text.startswith(("/", "\\")) or ".." in parts or (len(text) > 1 and text[1] == ":"):
        raise WrongValueError(f"must name a file inside the slot directory, not {quoted(text)}")
    if not parts:
        raise WrongValueError(f"must name a file, not {quoted(text)}")
    return "/".join(parts)


def quoted(text: str) -> str:
    """Text from a file, short and printable, for a sentence."""
    shown = text if len(text) <= 60 else text[:57] + "..."
    return repr(shown)


def suggestion(name: str, known: tuple[str, ...]) -> str:
    """`did you mean <x>?` for a tag that is nearly a known one, else empty."""
    import difflib

    by_lower = {tag.lower(): tag for tag in known}
    near = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.7)
    return f"did you mean <{by_lower[near[0]]}>?" if near else ""
