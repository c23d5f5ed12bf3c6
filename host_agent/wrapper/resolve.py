"""Names and command lines: soft links, macros and splitting, as BOINC and its wrapper do them.

BOINC puts a file of the project into the slot as a small *soft link* file,
`<soft_link>../../projects/example.org/in_123</soft_link>`, and its applications follow it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .job import Task

WINDOWS = os.name == "nt"
PYTHON_THEN, PYTHON_TODAY = "python", "python3"  # many systems have no `python` any more
_LINK_BYTES = 1024  # BOINC reads no more of a link either
_LINK = re.compile(rb"<soft_link>\s*([^<>\x00-\x1f]+?)\s*</soft_link>")
_RESOLVE = re.compile(r"boinc_resolve\(([^)]*)\)")


class Macros(NamedTuple):
    """What the macros of a job.xml stand for."""

    project_dir: str = "."
    nthreads: int = 1
    device: int = -1  # below 0: `$GPU_DEVICE_NUM` stays as it is
    slot: str = "."

    def table(self) -> Mapping[str, str]:
        """Macro to text, in the order in which they are replaced."""
        table = {"$PROJECT_DIR": self.project_dir, "$NTHREADS": str(self.nthreads), "$PWD": self.slot}
        if self.device >= 0:
            table["$GPU_DEVICE_NUM"] = str(self.device)
        return table

    def expand(self, text: str) -> str:
        """The text with its macros replaced, each once: what a macro brings in is not looked at again."""
        table = self.table()
        pattern = "|".join(re.escape(name) for name in table)
        return re.sub(pattern, lambda match: table[match[0]], text)


def in_guest(macros: Macros) -> Macros:
    """The same macros inside a VM: the host's directories are not there, the agent's home is."""
    return macros._replace(project_dir=".", slot=".")


def soft_link_target(path: Path) -> str | None:
    """Where a soft link file points, relative to the slot, or None for an ordinary file.

    Only BOINC's own form counts, `../../projects/<project>/<file>`: a result of a guest that claims to be
    a link to some other file of this host is an ordinary file.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_LINK_BYTES)
    except OSError:
        return None
    match = _LINK.match(head.lstrip())
    if match is None:
        return None
    target = match[1].decode("utf-8", "surrogateescape")
    parts = target.split("/")
    if parts[:3] != ["..", "..", "projects"] or len(parts) < 5 or {"..", ".", ""} & set(parts[3:]):
        return None
    return target


def resolve_name(slot: Path, name: str) -> str:
    """`boinc_resolve_filename`: the target of a link file (relative to the slot), else the name itself."""
    return soft_link_target(slot / name) or name


def resolve_path(slot: Path, name: str) -> Path:
    """The absolute path of a file of the slot, through a soft link if it is one."""
    return slot / resolve_name(slot, name)


def split_command_line(text: str) -> list[str]:
    """Words as BOINC's `parse_command_line` makes them.

    White space separates; a word that *begins* with `'` or `"` goes to the next such quote, and may be empty.
    Quotes inside a word are ordinary characters; there are no escapes.
    """
    return [word for word, _closed in _words(text)]


def unclosed_quote(text: str) -> bool:
    """Whether the last word opens a quote that nothing closes (it then goes to the end of the line)."""
    words = _words(text)
    return bool(words) and not words[-1][1]


def _words(text: str) -> list[tuple[str, bool]]:
    words: list[tuple[str, bool]] = []
    position = 0
    while position < len(text):
        char = text[position]
        if char.isspace():
            position += 1
        elif char in "'\"":
            end = text.find(char, position + 1)
            closed = end >= 0
            end = end if closed else len(text)
            words.append((text[position + 1 : end], closed))
            position = end + 1
        else:
            end = position
            while end < len(text) and not text[end].isspace():
                end += 1
            words.append((text[position:end], True))
            position = end
    return words


def command_words(task: Task, slot: Path, macros: Macros, extra: tuple[str, ...] = ()) -> list[str]:
    """The arguments of a task, split first, so that what a macro or a link brings in stays one word.

    On the host, `./name` and `boinc_resolve(name)` become the link's target; in a VM they stay a name,
    because the files were copied there under their own names.
    """
    words = split_command_line(task.command_line)
    if task.append_cmdline_args:
        words += extra
    values = in_guest(macros) if task.in_vm else macros
    return [_argument(values.expand(word), task, slot) for word in words]


def _argument(word: str, task: Task, slot: Path) -> str:
    if task.in_vm:
        return _RESOLVE.sub(lambda match: match[1].strip(), word)
    # A relative name would be looked up in exec_dir, which is not where links start.
    base = slot if task.exec_dir else Path()
    word = _RESOLVE.sub(lambda match: _with_slashes(str(base / resolve_name(slot, match[1].strip())), task), word)
    if word.startswith("./"):
        target = soft_link_target(slot / word)
        if target is not None:
            return str(base / target)
    return word


def _with_slashes(path: str, task: Task) -> str:
    """A path for a program's eyes: on Windows with the slashes of the system, unless the job wants the others."""
    if not WINDOWS:
        return path
    return path.replace("\\", "/") if task.forward_slashes else path.replace("/", "\\")


def application_path(task: Task, slot: Path, macros: Macros) -> Path | None:
    """The program of a host task, absolute, or None when there is no such file.

    A name that the slot has, or with a `/` in it, is a file of the slot (through a soft link);
    a bare name that the slot has not is looked up on PATH, `python` also under the name that it has today.
    """
    name = macros.expand(task.application)
    path = resolve_path(slot, name)
    if path.is_file():
        return path
    if "/" in name or "\\" in name:
        return None
    import shutil

    found = shutil.which(name) or (shutil.which(PYTHON_TODAY) if name == PYTHON_THEN else None)
    return Path(found).absolute() if found else None


def environment(task: Task, macros: Macros) -> dict[str, str]:
    """The `setenv` entries of a task, macros replaced; of a name given twice the last one counts."""
    values = in_guest(macros) if task.in_vm else macros
    pairs = (entry.partition("=") for entry in task.setenv)
    return {name: values.expand(value) for name, _, value in pairs}
