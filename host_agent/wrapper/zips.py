"""BOINC's `unzip_input` and `zip_output`: archives of a slot's inputs and outputs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import VMwrapperError
from common.files import HOST_AGENT_LOG

from .boinc.slot_files import FINISH_FILE, INIT_DATA_FILE, TRICKLE_UP_FILE
from .checkpoint import CHECKPOINT_FILE, write_atomically
from .failures import passing_errno
from .graphics import GRAPHICS_STATUS_FILE
from .job import ZipOutput
from .leftovers import PROCESSES_FILE
from .log import STDERR_FILE
from .resolve import resolve_path
from .state import STATE_FILE

INITIAL_FILES = "initial_file_list"
_OURS = {
    INITIAL_FILES,
    CHECKPOINT_FILE,
    STATE_FILE,
    PROCESSES_FILE,
    GRAPHICS_STATUS_FILE,
    HOST_AGENT_LOG,
    f"{HOST_AGENT_LOG}.1",
    f"{HOST_AGENT_LOG}.2",
    FINISH_FILE,
    INIT_DATA_FILE,
    TRICKLE_UP_FILE,
    "boinc_lockfile",
    "boinc_mmap_file",
}


class ZipError(VMwrapperError):
    """An archive that cannot be read or written."""


def unzip_inputs(slot: Path, names: Sequence[str], breathe: Callable[[], None]) -> list[str]:
    """Unpack archives that are there, then remove them. Returns what was done.

    `breathe` is called between the pieces: a big archive takes longer than a client waits for an application to quit.
    """
    done = []
    for name in names:
        if not (slot / name).exists():
            continue
        import zipfile

        try:
            with zipfile.ZipFile(resolve_path(slot, name)) as archive:
                for member in archive.infolist():
                    breathe()
                    path = Path(archive.extract(member, slot))  # which keeps members inside the slot
                    mode = member.external_attr >> 16 & 0o777
                    if mode and path.is_file():
                        path.chmod(mode | 0o600)
        except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            if isinstance(error, OSError) and passing_errno(error.errno):
                raise
            raise ZipError(f"<unzip_input> {name} cannot be unpacked: {error}") from None
        (slot / name).unlink()
        done.append(name)
    return done


def note_initial_files(slot: Path) -> None:
    """Write down, once, what was there before the first task; `stderr.txt` may be part of the results."""
    path = slot / INITIAL_FILES
    if not path.exists():
        names = sorted(entry.name for entry in slot.iterdir() if entry.name != STDERR_FILE)
        write_atomically(path, "".join(f"{name}\n" for name in names))


def zip_outputs(slot: Path, output: ZipOutput, breathe: Callable[[], None]) -> int:
    """Pack the new files that match into the archive, unless it is already there. Returns how many."""
    import zipfile

    target = resolve_path(slot, output.zipfilename)
    if target.exists():
        return 0
    try:
        initial = set((slot / INITIAL_FILES).read_text("utf-8").splitlines())
    except OSError:
        initial = set()
    patterns = [re.compile(pattern) for pattern in output.patterns]
    names = [
        entry.name
        for entry in sorted(slot.iterdir())
        if entry.is_file()
        and entry.name not in initial | _OURS
        and any(pattern.search(entry.name) for pattern in patterns)
    ]
    temporary = target.with_name(target.name + ".new")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                breathe()
                archive.write(resolve_path(slot, name), name)
        temporary.replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError) or passing_errno(error.errno):
            raise
        raise ZipError(f"<zip_output> {output.zipfilename} cannot be written: {error}") from None
    return len(names)
