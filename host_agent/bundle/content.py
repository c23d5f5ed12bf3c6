"""What of a job goes where: files of the application version, files of each workunit, results; and what is missing."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

from common.errors import ConfigError
from common.files import JOB_FILE, SLOT_IMAGES
from host_agent.hypervisors.images import DEFAULT_IMAGE, MANIFEST, find_image, image_for
from host_agent.vmctl.check import missing_files
from host_agent.wrapper.job import Job, Task, load_job
from host_agent.wrapper.resolve import split_command_line

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*\Z")
_RESOLVE = re.compile(r"boinc_resolve\(([^)]*)\)")
_MOST_FILES = 2000
README = "README.md"  # is for whoever has the directory, not for clients


@attrs.frozen
class BundleFile:
    """A file of the application version."""

    logical: str  # its name in the slot, with slashes
    source: Path | bytes
    executable: bool = False
    main: bool = False
    copied: bool = True  # into the slot; else a link file is there, which only the wrapper follows
    packed: bool = False  # sent to clients with gzip


@attrs.frozen
class Content:
    """A job, sorted."""

    files: tuple[BundleFile, ...]
    inputs: tuple[tuple[str, bool], ...]  # name, whether the client copies it into the slot
    outputs: tuple[str, ...]
    notes: tuple[str, ...]


def sort_job(
    folder: Path,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
    *,
    image: str = "",
    with_image: bool = True,
) -> Content:
    """Read a folder with a job.xml. `inputs` are what each workunit brings, `outputs` what goes back (default: all that
    job.xml names as results). Raises ConfigError for the first thing that would not work on a volunteer's computer."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a directory", "name the directory of a job: job.xml and its files")
    if not (folder / JOB_FILE).is_file():
        raise ConfigError(f"there is no {JOB_FILE} in {folder}", "vmctl new writes one")
    job = load_job(folder / JOB_FILE)
    for name in (*inputs, *outputs):
        if not _PLAIN.match(name):
            raise ConfigError(f"{name!r} is not a plain file name", "inputs and outputs have no directories")
    _no_duplicates("--input", inputs)
    _no_duplicates("--output", outputs)
    own = {name: path for name, path in _walk(folder) if name not in inputs}
    notes = _check(job, folder, own, inputs)
    files = [
        BundleFile(name, path, executable=bool(path.stat().st_mode & 0o100), copied=_is_copied(job, name, folder))
        for name, path in own.items()
    ]
    if job.uses_vm and with_image:
        files += _images(job, own, image)
    results = tuple(outputs) or tuple(_results(job))
    if not results:
        raise ConfigError("the job names no result that could be sent back", "name them: --output NAME")
    for name in results:
        if name in own or name in inputs:
            raise ConfigError(f"{name} is a result and also one of the job's files", "give the result another name")
    return Content(tuple(files), tuple((name, _is_copied(job, name, folder)) for name in inputs), results, notes)


def _no_duplicates(option: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{option} {name} is given twice")


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """The folder's files, but hidden ones and its README; ConfigError for a name that a project cannot send."""
    count = 0
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
        if hidden or path.is_dir() or relative.as_posix() == README:
            continue
        if not path.is_file():
            raise ConfigError(f"{path} is neither a file nor a directory, or a link that leads nowhere")
        for part in relative.parts:
            if not _PLAIN.match(part):
                raise ConfigError(
                    f"the name {relative.as_posix()!r} cannot be sent to clients",
                    "letters, digits and _ . + - are possible",
                )
        if relative.name.endswith(".sig"):
            raise ConfigError(
                f"the name {relative.as_posix()!r} would be taken for a signature by the project", "rename the file"
            )
        count += 1
        if count > _MOST_FILES:
            raise ConfigError(f"{folder} has more than {_MOST_FILES} files", "pack them: <unzip_input> in job.xml")
        yield relative.as_posix(), path


def _check(job: Job, folder: Path, own: dict[str, Path], inputs: Sequence[str]) -> tuple[str, ...]:
    """Notes about what may be wrong; ConfigError for what is."""
    with tempfile.TemporaryDirectory(prefix="vmctl-bundle-") as name:
        slot = Path(name)
        for logical, path in own.items():
            (slot / logical).parent.mkdir(parents=True, exist_ok=True)
            (slot / logical).symlink_to(path.resolve())
        for each in inputs:
            (slot / each).touch(0o755)
        missing, later = missing_files(job, slot)
        missing, later = ([s.replace(str(slot), str(folder)) for s in part] for part in (missing, later))
    if missing:
        raise ConfigError(missing[0], "put it into the directory, or say --input NAME when each workunit brings it")
    made = {repr(name) for task in job.tasks for name in (*task.copy_files_from_vm, task.stdout_filename)}
    notes = [*job.warnings, *(each for each in later if not any(name in each for name in made))]
    notes += [
        f"{job.path.name}:{task.line}: {task.application} must be on every volunteer's computer"
        for task in (*job.unzip_tasks, *job.manage_tasks, *job.daemons, *job.tasks)
        if not task.in_vm and _plain_name(task.application) not in {*own, *inputs}
    ]
    return tuple(notes)


def _plain_name(name: str) -> str:
    return name.removeprefix("./")


def _is_copied(job: Job, name: str, folder: Path) -> bool:
    """Whether a file must be in the slot itself: when a program on the host opens it by its name."""
    if name == JOB_FILE or _of_an_image(folder / name):
        return False
    host = [task for task in (*job.unzip_tasks, *job.manage_tasks, *job.daemons, *job.tasks) if not task.in_vm]
    if any(_opens(task, name) for task in host):
        return True
    followed: set[str] = set(job.unzip_input)
    for task in (*job.unzip_tasks, *job.manage_tasks, *job.daemons, *job.tasks):
        followed |= {_plain_name(each) for each in (task.application, task.stdin_filename, task.image)}
        followed |= {_plain_name(each.rstrip("/")) for each in task.copy_files_to_vm}
        followed |= {match[1].strip() for match in _RESOLVE.finditer(task.command_line)}
    return name not in followed


def _opens(task: Task, name: str) -> bool:
    return any(_plain_name(word) == name for word in split_command_line(task.command_line))


def _of_an_image(path: Path) -> bool:
    return (path.parent / MANIFEST).is_file()


def _results(job: Job) -> Iterator[str]:
    """What job.xml says comes out: the archive, or else what tasks write and what comes out of VMs."""
    if job.zip_output:
        yield job.zip_output.zipfilename
        return
    seen = set()
    for task in job.tasks:
        for name in (*task.copy_files_from_vm, task.stdout_filename):
            if name and _PLAIN.match(name) and name not in seen:
                seen.add(name)
                yield name


def _images(job: Job, own: dict[str, Path], instead: str) -> Iterator[BundleFile]:
    """The images of the job's VMs, where the host agent of a slot looks for them."""
    done = set()
    for task in job.tasks:
        if not task.in_vm or _plain_name(task.image) in own or f"{_plain_name(task.image)}/{MANIFEST}" in own:
            continue
        found = find_image(instead) if instead and not task.image else image_for(task.virtualmachine, task.image)
        name = DEFAULT_IMAGE if instead and not task.image else found.directory.name
        if name in done:
            continue
        done.add(name)
        for path in (found.directory / MANIFEST, found.disk, found.kernel, found.initrd):
            if path is not None:
                yield BundleFile(f"{SLOT_IMAGES}/{name}/{path.name}", path, copied=False, packed=path.name != MANIFEST)
