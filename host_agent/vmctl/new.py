"""`vmctl new`: a directory with a job.xml for a program, and how to go on."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import attrs

from common.errors import ConfigError, VMwrapperError
from common.files import JOB_FILE
from host_agent.hypervisors.images import DEFAULT_IMAGE
from host_agent.wrapper.job import load_job
from host_agent.wrapper.resolve import split_command_line, unclosed_quote

IMAGES = {"debian": DEFAULT_IMAGE}  # short names
HOST = "none"
INPUT = "input.txt"
STDOUT, STDERR = "stdout.txt", "stderr_program.txt"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}\Z")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*\Z")

STUB = """#!/bin/sh
# A stand-in for your program, until you put yours here: it says how it was called, and copies its input.
echo "$0 was called with: $*"
[ ! -e {input} ] || cat {input}
for step in 1 2 3 4 5; do
    echo "0.$((step * 2 - 1))" > fraction_done    # how far it is; vmwrapper tells the client
    sleep 1
done
"""


def add_parser(subparsers: Any) -> None:
    """Add `new` to vmctl's subcommands; it sets `func`."""
    parser = subparsers.add_parser(
        "new",
        help="write a job for a program of yours: job.xml, a place for its files, and how to go on",
        description="Write a new directory with a commented job.xml, the program, its inputs and a README.md that says "
        "how to run it here, in a BOINC client and on a project.",
        epilog="example: vmctl new myapp --command './model --steps 1000' --input in.csv --output out.csv",
    )
    parser.add_argument("name", metavar="NAME", help="of the application and of the directory")
    parser.add_argument("--command", required=True, metavar="WORDS", help="the program and its arguments, as one word")
    parser.add_argument(
        "--image",
        default="debian",
        metavar="NAME",
        help="what its virtual machine is made of; none: no VM (%(default)s)",
    )
    parser.add_argument("--input", action="append", default=[], metavar="FILE", help="what it reads (copied, if here)")
    parser.add_argument("--output", action="append", default=[], metavar="NAME", help="what it writes besides stdout")
    parser.add_argument("--file", action="append", default=[], metavar="FILE", help="what it needs besides")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where to write it (default: ./NAME)")
    parser.set_defaults(func=run)


@attrs.frozen
class Plan:
    """A job to be written."""

    name: str
    program: str  # a file of the directory, or a program of the image
    own: bool  # the former
    arguments: str
    image: str  # empty: on the host
    inputs: tuple[str, ...]
    files: tuple[str, ...]
    outputs: tuple[str, ...]


def run(options: argparse.Namespace) -> int:
    plan = make_plan(options.name, options.command, options.image, options.input, options.output, options.file)
    target: Path = options.directory or Path(options.name)
    if target.exists():
        raise ConfigError(f"{target} exists already", "choose another name, or --directory")
    new = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        _write(new, plan, [*options.input, *options.file])
        load_job(new / JOB_FILE, strict=True)
        new.rename(target)
    except OSError as error:
        raise VMwrapperError(f"{target} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    print(f"{target} is ready; {target / 'README.md'} says how to go on. First:")
    print(f"  vmctl check {target / JOB_FILE}")
    if plan.own and not Path(plan.program).is_file():
        print(f"{target / plan.program} is a stand-in: put your program there", file=sys.stderr)
    return 0


def make_plan(
    name: str, command: str, image: str, inputs: Sequence[str], outputs: Sequence[str], files: Sequence[str]
) -> Plan:
    """Check what was asked for. Raises ConfigError."""
    if not _NAME.match(name):
        raise ConfigError(f"{name!r} cannot be the name of an application", "letters, digits, _ and -")
    words = split_command_line(command)
    if not words or unclosed_quote(command):
        raise ConfigError(f"{command!r} is not a command line", "--command './model --steps 1000'")
    first = command.split(maxsplit=1)
    program = words[0].removeprefix("./")
    if not _FILE.match(program):
        raise ConfigError(f"{words[0]!r} is not the name of a program of the job", "such as ./model, or python3")
    names = [Path(each).name for each in (*inputs, *files)] or [INPUT]
    for each in (*names, *outputs):
        if not _FILE.match(each):
            raise ConfigError(f"{each!r} is not a plain file name")
    given = [*names, *outputs]
    for each in given:
        if given.count(each) > 1:
            raise ConfigError(f"{each} is named twice")
    return Plan(
        name=name,
        program=program,
        own=words[0].startswith("./") or Path(program).is_file(),
        arguments=first[1] if len(first) > 1 else "",
        image="" if image == HOST else IMAGES.get(image, image),
        inputs=tuple(Path(each).name for each in inputs) or (() if files else (INPUT,)),
        files=tuple(Path(each).name for each in files),
        outputs=tuple(outputs),
    )


def _write(directory: Path, plan: Plan, sources: Sequence[str]) -> None:
    directory.mkdir(parents=True)
    (directory / JOB_FILE).write_text(job_xml(plan), "utf-8")
    (directory / "README.md").write_text(readme(plan), "utf-8")
    for source in sources:
        if Path(source).is_file():
            shutil.copy(source, directory / Path(source).name)
        else:
            (directory / Path(source).name).write_text("put what your program reads here\n")
    if not sources:
        (directory / INPUT).write_text("put what your program reads here\n")
    if plan.own:
        target = directory / plan.program
        if Path(plan.program).is_file():
            shutil.copy(plan.program, target)
        else:
            target.write_text(STUB.format(input=plan.inputs[0] if plan.inputs else INPUT))
        target.chmod(0o755)


def job_xml(plan: Plan) -> str:
    """The job, with comments."""
    application = f"./{plan.program}" if plan.own else plan.program
    lines = [
        "<!-- What vmwrapper does, task after task; docs/job-xml.md describes every tag. -->",
        "<job_desc>",
        "  <task>",
    ]
    if plan.image:
        lines += [
            "    <!-- It runs in a virtual machine of this name, made from this image. -->",
            f"    <virtualmachine>{plan.name}</virtualmachine>",
            f"    <image>{escape(plan.image)}</image>",
        ]
    lines += [f"    <application>{escape(application)}</application>"]
    if plan.arguments:
        lines += [f"    <command_line>{escape(plan.arguments)}</command_line>"]
    if plan.image:
        if plan.own:
            lines += ["    <copy_app_to_VM>1</copy_app_to_VM>"]
        lines += ["    <!-- What goes into the machine before it starts, under the same names. -->"]
        lines += [f"    <copy_file_to_VM>{escape(name)}</copy_file_to_VM>" for name in (*plan.inputs, *plan.files)]
        lines += ["    <!-- What comes out when it has ended with status 0. -->"] if plan.outputs else []
        lines += [f"    <copy_file_from_VM>{escape(name)}</copy_file_from_VM>" for name in plan.outputs]
    lines += [
        f"    <stdout_filename>{STDOUT}</stdout_filename>",
        f"    <stderr_filename>{STDERR}</stderr_filename>",
        "    <!-- A number between 0 and 1 that your program writes there is how far it is; it may do without. -->",
        "    <fraction_done_filename>fraction_done</fraction_done_filename>",
        "  </task>",
        "</job_desc>",
    ]
    return "\n".join(lines) + "\n"


def readme(plan: Plan) -> str:
    """How to go on."""
    inputs = "".join(f" --input {name}" for name in plan.inputs)
    results = "".join(f" --output {name}" for name in (*plan.outputs, STDOUT))
    image = (
        f"    vmctl image build                 # {plan.image}, once; half a minute\n"
        if plan.image == DEFAULT_IMAGE
        else ""
    )
    where = "of this directory" if plan.own else "of the image" if plan.image else "of the host"
    return f"""# {plan.name}

`{JOB_FILE}` says what runs: `{plan.program}`, a program {where}.
Inputs: {", ".join(plan.inputs) or "none"}. Results: {", ".join((*plan.outputs, STDOUT))}.

## Run it here
Commands for the directory above this one.

{image}    vmctl check {plan.name}/{JOB_FILE}
    cp -r {plan.name} slot && cd slot && vmwrapper && cat {STDOUT}

`slot/stderr.txt` is vmwrapper's log. Remove `slot` before the next trial: a job that is done is not done again.

## Make an application version of it
    vmctl bundle {plan.name} --version 1.00 --project PROJECT{inputs}{results} --key PROJECT/keys/code_sign_private

PROJECT is the directory of a BOINC project, or any directory: `apps/{plan.name}/1.00/` and `templates/` appear in it.

## In a BOINC client, on a project
On the project's server, in PROJECT:

    bin/xadd && bin/update_versions                       # {plan.name} must be in project.xml
    bin/stage_file {plan.inputs[0] if plan.inputs else INPUT}
    bin/create_work --appname {plan.name} {" ".join(plan.inputs)}

and attach a client to it: `boinccmd --project_attach URL KEY`.
"""
