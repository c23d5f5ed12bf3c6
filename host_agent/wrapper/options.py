"""The command line of `vmwrapper`: BOINC's wrapper's options, and `--job`, `--help`, `--version` of ours.

Read by hand rather than with argparse: it costs a tenth of the start-up of a host-only job, and BOINC's options
need no more than this.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.errors import ConfigError
from common.files import JOB_FILE

HELP = """\
usage: vmwrapper [options]          run the job.xml of the current directory (the slot)

A job.xml is a list of tasks. Each runs on this computer or, when it names a <virtualmachine>, inside one:

    <job_desc>
      <task>
        <virtualmachine>CernVM</virtualmachine>
        <application>./worker.py</application>
        <copy_app_to_VM>1</copy_app_to_VM>
        <copy_file_to_VM>in</copy_file_to_VM>
        <copy_file_from_VM>out</copy_file_from_VM>
        <command_line>5</command_line>
      </task>
    </job_desc>

  --job FILE             the job file (default: job.xml)
  --nthreads N           what $NTHREADS stands for in command lines (default: 1)
  --device N             what $GPU_DEVICE_NUM stands for
  --trickle SECONDS      report the run time to the project every so many seconds of it
  --use_tstp             suspend a task with TSTP, which it can catch; only its first program, unless <multi_process/>
  --sporadic             the task computes now and then, as files `ca` and `ac` say
  --passthrough_child W… all further words are arguments of the tasks with <append_cmdline_args/>
  --version, --help

It works without a BOINC client too. What it does goes to stderr.txt, how far it is to wrapper_checkpoint.txt
(a restart goes on from there), and a finished job leaves boinc_finish_called.
Exit status: 0 done or told to quit, 195 a task's program failed, 206 wrong option or job.xml,
208 a virtual machine failed (docs/exit-codes.md).

Look at a job before you run it:   vmctl check job.xml
"""


class UsageError(ConfigError):
    """The command line cannot be used."""


class Options(NamedTuple):
    """The command line as values."""

    job: Path = Path(JOB_FILE)
    nthreads: int = 1
    device: int = -1
    trickle_s: float = 0.0
    use_tstp: bool = False
    sporadic: bool = False
    help: bool = False
    version: bool = False
    child_words: tuple[str, ...] = ()  # for tasks with <append_cmdline_args/>


def parse_options(words: Sequence[str]) -> Options:
    """Read the words after the program's name. Raises UsageError."""
    values: dict[str, object] = {"nthreads": _environment_threads()}
    rest = iter(words)
    for word in rest:
        name, equals, inline = word.partition("=")
        if name in ("--help", "-h", "--version", "-v"):
            values["help" if name in ("--help", "-h") else "version"] = True
        elif word in ("--use_tstp", "--sporadic"):
            values[word.removeprefix("--")] = True
        elif word == "--passthrough_child":
            values["child_words"] = tuple(rest)
        elif name in _WITH_VALUE:
            field, convert = _WITH_VALUE[name]
            text = inline if equals else next(rest, None)
            try:
                if text is None:
                    raise ValueError
                value = convert(text)
            except ValueError:
                given = "nothing" if text is None else repr(text)
                raise UsageError(f"{name} needs a {_KINDS[convert]}, not {given}", _HINT) from None
            values[field] = value
        else:
            raise UsageError(f"vmwrapper has no option {word!r}", _HINT)
    return Options(**values)  # type: ignore[arg-type]


def _environment_threads() -> int:
    """The client says the number of threads in the environment too; the option goes first."""
    text = os.environ.get("NTHREADS", "")
    return int(text) if text.isdecimal() and int(text) > 0 else 1


_HINT = "vmwrapper --help lists the options"
_KINDS: dict[object, str] = {int: "whole number", float: "number", Path: "file name"}
_WITH_VALUE: dict[str, tuple[str, type[int] | type[float] | type[Path]]] = {
    "--job": ("job", Path),
    "--nthreads": ("nthreads", int),
    "--device": ("device", int),
    "--trickle": ("trickle_s", float),
}
