"""Reading job.xml: bytes to a `Job`, every mistake to one sentence.

A job.xml comes over the network from a project, so it is read as hostile: no DTD, no entities, no network,
a cap on size (before the file is read) and on depth. Our own checks make the sentences; the RelaxNG schema
`job.rng` then looks at the same tree, without the unknown tags, as a backstop.
"""

from __future__ import annotations

import pkgutil
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lxml import etree

from .job import Job, JobError, Task, TaskKind, ZipOutput
from .job_tags import (
    JOB_TAGS,
    ROOT,
    TASK_KINDS,
    TASK_TAGS,
    ZIP_TAGS,
    Type,
    WrongValueError,
    convert,
    quoted,
    slot_name,
    suggestion,
)
from .resolve import unclosed_quote

MAX_BYTES = 1 << 20
MAX_DEPTH = 16
SCHEMA = Path(__file__).with_name("job.rng")


def read_capped(path: Path) -> bytes:
    """The file's bytes; an oversized file is refused before any of it is read."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise JobError(path.name, 0, "is not a regular file")
        if info.st_size > MAX_BYTES:
            raise _too_big(path, info.st_size)
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise JobError(path.name, 0, f"cannot be read: {error.strerror}", f"looked for {path}") from None
    if len(data) > MAX_BYTES:
        raise _too_big(path, len(data))
    return data


def _too_big(path: Path, size: int) -> JobError:
    return JobError(path.name, 0, f"has {size:,} bytes; a job file has at most {MAX_BYTES:,}")


def parse_job(data: bytes, path: Path, strict: bool = False, backstop: bool = True) -> Job:
    """Parse and check. `backstop=False` leaves the schema out (a test compares the two)."""
    root = _parse_tree(data, path.name)
    parser = _Parser(path, strict)
    job = parser.job(root)
    if backstop:
        prune(root)
        problem = schema_problem(root)
        if problem is not None:
            raise JobError(path.name, problem[0], problem[1])
    return job


def _parse_tree(data: bytes, file: str) -> etree._Element:
    parser = etree.XMLParser(
        resolve_entities=False,
        load_dtd=False,
        dtd_validation=False,
        no_network=True,
        huge_tree=False,
        remove_comments=True,
        remove_pis=True,
    )
    # Before libxml2 sees it: a DTD can already cost time while it is parsed.
    doctype = re.search(rb"<!(DOCTYPE|ENTITY)", data, re.IGNORECASE)
    if doctype:
        raise _doctype_error(file, data.count(b"\n", 0, doctype.start()) + 1)
    try:
        root = etree.fromstring(data, parser)
    except etree.XMLSyntaxError as error:
        # In one line: the parser's own text may end with a newline.
        text = " ".join((error.msg or "it cannot be parsed").rsplit(", line ", 1)[0].split())
        raise JobError(file, error.lineno or 1, f"is not well-formed XML: {text}") from None
    except ValueError as error:
        raise JobError(file, 1, f"is not well-formed XML: {error}") from None
    if root.getroottree().docinfo.doctype:  # one that hid in another encoding
        raise _doctype_error(file, 1)
    depth = 0
    for event, element in etree.iterwalk(root, events=("start", "end")):
        depth += 1 if event == "start" else -1
        if depth > MAX_DEPTH:
            raise JobError(file, _line(element), f"tags are nested more than {MAX_DEPTH} deep")
    return root


def _doctype_error(file: str, line: int) -> JobError:
    return JobError(file, line, "has a DOCTYPE or an entity, which a job file may not have", "remove it")


class _Parser:
    """One pass over the tree in document order, so the first mistake of the file is the one reported."""

    def __init__(self, path: Path, strict: bool) -> None:
        self.path = path
        self.file = path.name
        self.strict = strict
        self.warnings: list[str] = []

    def job(self, root: etree._Element) -> Job:
        if root.tag != ROOT:
            raise self.error(root, f"the root must be <{ROOT}>, not <{_name(root)}>", tag=ROOT)
        tasks: dict[TaskKind, list[Task]] = {kind: [] for kind in TaskKind}
        daemons: list[Task] = []
        unzip_input: tuple[str, ...] = ()
        zip_output: ZipOutput | None = None
        graphics = False
        period: float | None = None
        seen: dict[str, int] = {}
        for child in self.children(root, JOB_TAGS):
            name = str(child.tag)
            if name in TASK_KINDS:
                kind = TaskKind(name)
                task = self.task(child, kind, len(tasks[kind]) + 1, len(daemons) + 1)
                if kind is TaskKind.TASK and not task.daemon:
                    self.check_group(task, child, tasks[kind])
                (daemons if task.daemon else tasks[kind]).append(task)
                continue
            self.once(child, seen)
            if name == "unzip_input":
                unzip_input = tuple(self.zip_part(child)["zipfilename"])
            elif name == "zip_output":
                zip_output = self.zip_output(child)
            elif name == "checkpoint_period":
                period = float(str(self.value(child, Type.SECONDS))) if self.text(child) else None
            else:
                graphics = bool(self.value(child, Type.BOOL))
        if not tasks[TaskKind.TASK]:
            raise self.missing(root, "has no <task>: there is nothing to run", "task")
        return Job(
            path=self.path,
            unzip_tasks=tuple(tasks[TaskKind.UNZIP]),
            manage_tasks=tuple(tasks[TaskKind.MANAGE]),
            tasks=tuple(tasks[TaskKind.TASK]),
            daemons=tuple(daemons),
            unzip_input=unzip_input,
            zip_output=zip_output,
            enable_graphics_support=graphics,
            checkpoint_period=period,
            warnings=tuple(self.warnings),
        )

    def task(self, element: etree._Element, kind: TaskKind, number: int, daemon_number: int) -> Task:
        values: dict[str, Any] = {}
        seen: dict[str, int] = {}
        lines: dict[str, etree._Element] = {}
        for child in self.children(element, tuple(TASK_TAGS)):
            tag = TASK_TAGS[str(child.tag)]
            if not tag.repeated:
                self.once(child, seen)
            text = self.text(child)
            if not text and tag.type is not Type.BOOL:
                continue  # the seed's template leaves unused tags empty
            value = self.value(child, tag.type)
            lines[tag.name] = child
            if tag.repeated:
                values[tag.field] = (*values.get(tag.field, ()), value)
            else:
                values[tag.field] = value
        if "application" not in values:
            raise self.missing(element, f"<{kind.value}> needs an <application>", "application")
        self.check_task(kind, values, lines)
        if values.get("daemon"):
            number = daemon_number
        return Task(kind=kind, line=_line(element), number=number, **values)

    def check_task(self, kind: TaskKind, values: dict[str, Any], lines: dict[str, etree._Element]) -> None:
        """What no schema says: tags that contradict each other, and tags without effect."""
        if "virtualmachine" in values:
            if kind is not TaskKind.TASK:
                raise self.error(lines["virtualmachine"], f"a <{kind.value}> runs on the host, not in a VM")
            if values.get("daemon"):
                raise self.error(lines["daemon"], "a <daemon> runs on the host, not in a virtual machine")
        else:
            for name, element in lines.items():
                if TASK_TAGS[name].vm_only and values[TASK_TAGS[name].field] not in (False, 0):
                    self.warn(element, f"<{name}> has no effect without a <virtualmachine>")
        if kind is not TaskKind.TASK and values.pop("daemon", False):
            self.warn(lines["daemon"], f"<daemon> has no effect in a <{kind.value}>")
        if "parallel_group" in values and (kind is not TaskKind.TASK or values.get("daemon")):
            what = f"<{kind.value}>" if kind is not TaskKind.TASK else "<daemon>, which runs beside all tasks anyway"
            self.warn(lines["parallel_group"], f"<parallel_group> has no effect in a {what}")
            del values["parallel_group"]
        command = values.get("command_line", "")
        if unclosed_quote(command):
            self.warn(lines["command_line"], "<command_line> has a quote that is not closed")
        if re.search(r"boinc_resolve\([^)]*$", command):
            raise self.error(lines["command_line"], "<command_line> has a boinc_resolve( without its )")

    def check_group(self, task: Task, element: etree._Element, before: list[Task]) -> None:
        """A group is one step of the job, so nothing stands between its tasks; and none writes another's files."""
        name = f"the parallel group {quoted(task.parallel_group)}"
        group = [other for other in before if task.parallel_group and other.parallel_group == task.parallel_group]
        if group and group[-1] is not before[-1]:
            raise self.error(
                element,
                f"{name} began on line {group[0].line} and had ended before task {before[-1].number}",
                "put the tasks of a group one after another, or give this one another group",
                "parallel_group",
            )
        for other in group:
            both = writes(task).keys() & writes(other).keys()
            for field, file in sorted(writes(task)[key] for key in both):
                raise self.error(
                    element,
                    f"<{field}> {quoted(file)} is also that of task {other.number}, which runs at the same time",
                    tag=field,
                )

    def zip_part(self, element: etree._Element) -> dict[str, list[str]]:
        known = ZIP_TAGS[str(element.tag)]
        found: dict[str, list[str]] = {name: [] for name in known}
        for child in self.children(element, known):
            is_pattern = child.tag == "filename"
            text = str(self.value(child, Type.TEXT if is_pattern else Type.FILE))
            found[str(child.tag)].append(text)
        if not found["zipfilename"]:
            raise self.missing(element, f"<{_name(element)}> needs a <zipfilename>", "zipfilename")
        return found

    def zip_output(self, element: etree._Element) -> ZipOutput:
        found = self.zip_part(element)
        if len(found["zipfilename"]) > 1:
            raise self.error(element, "<zip_output> has more than one <zipfilename>", tag="zipfilename")
        for child in element.iterfind("filename"):
            try:
                re.compile(self.text(child))
            except re.error as error:
                raise self.error(child, f"<filename> must be a regular expression: {error}") from None
        return ZipOutput(found["zipfilename"][0], tuple(found["filename"]))

    # Small parts

    def children(self, element: etree._Element, known: tuple[str, ...]) -> Iterator[etree._Element]:
        """The known child tags; anything else is a warning, or an error under strict."""
        if element.attrib:
            self.warn(element, f"<{_name(element)}> has attributes, which mean nothing here")
        if _loose_text(element):
            self.warn(element, f"<{_name(element)}> has text outside of its tags")
        for child in element:
            if child.tag in known:
                yield child
            else:
                name = _name(child)
                self.warn(child, f"<{name}> is not a tag of <{_name(element)}>", suggestion(name, known))

    def once(self, child: etree._Element, seen: dict[str, int]) -> None:
        name, line = str(child.tag), _line(child)
        if name in seen:
            raise self.error(child, f"<{name}> is given twice (first on line {seen[name]})")
        seen[name] = line

    def value(self, child: etree._Element, type_: Type) -> object:
        text = self.text(child)
        try:
            if type_ is Type.FILE:
                return slot_name(text)
            if type_ is Type.TEXT and not text:
                raise WrongValueError("must not be empty")
            return convert(type_, text)
        except WrongValueError as error:
            raise self.error(child, f"<{_name(child)}> {error}") from None

    def text(self, child: etree._Element) -> str:
        if child.attrib:
            self.warn(child, f"<{_name(child)}> has attributes, which mean nothing here")
            child.attrib.clear()  # one warning is enough
        if len(child):
            raise self.error(child, f"<{_name(child)}> must be plain text, but has <{_name(child[0])}> inside")
        return (child.text or "").strip()

    def error(self, element: etree._Element, text: str, hint: str = "", tag: str = "") -> JobError:
        return JobError(self.file, _line(element), text, hint, tag or _name(element))

    def missing(self, element: etree._Element, text: str, tag: str) -> JobError:
        """A tag is not there; perhaps it is, with a slip of the pen."""
        for child in element:
            if hint := suggestion(_name(child), (tag,)):
                return self.error(child, f"{text}, and <{_name(child)}> is none", hint, tag)
        return self.error(element, text, tag=tag)

    def warn(self, element: etree._Element, text: str, hint: str = "") -> None:
        if self.strict:
            raise self.error(element, text, hint)
        self.warnings.append(f"{self.file}:{_line(element)}: {text}{'; ' if hint else ''}{hint}")


def writes(task: Task) -> dict[tuple[str, str], tuple[str, str]]:
    """The files that a task writes: VM ("" is the slot) and name, to the tag that says so and the name as it is."""
    found = {}
    there = task.virtualmachine
    for tag, place, names in (
        ("stdout_filename", "", (task.stdout_filename,)),
        ("stderr_filename", "", (task.stderr_filename,)),
        ("copy_file_from_VM", "", task.copy_files_from_vm if there else ()),
        ("checkpoint_filename", there, (task.checkpoint_filename,)),
        ("fraction_done_filename", there, (task.fraction_done_filename,)),
    ):
        found.update({(place, name): (tag, name) for name in names if name})
    return found


def prune(root: etree._Element) -> None:
    """Take out, in place, what we only warn about, so that the schema sees what we use."""
    root.attrib.clear()
    _prune_children(root, JOB_TAGS)
    for part in root:
        name = str(part.tag)
        if name in TASK_KINDS:
            _prune_children(part, tuple(TASK_TAGS))
        elif name in ZIP_TAGS:
            _prune_children(part, ZIP_TAGS[name])


def _prune_children(element: etree._Element, known: tuple[str, ...]) -> None:
    element.text = None
    for child in list(element):
        child.tail = None
        if child.tag not in known:
            element.remove(child)
            continue
        child.attrib.clear()
        if not len(child):
            child.text = (child.text or "").strip() or None


_schema: etree.RelaxNG | None = None


def schema_problem(root: etree._Element) -> tuple[int, str] | None:
    """Line and text of the first thing that the schema refuses, or None."""
    global _schema
    if _schema is None:
        data = pkgutil.get_data(__package__, SCHEMA.name)  # not by its path: a frozen program has it in an archive
        assert data is not None
        _schema = etree.RelaxNG(etree.fromstring(data))
    if _schema.validate(root):
        return None
    first = _schema.error_log[0] if len(_schema.error_log) else None
    return (first.line, f"does not fit the schema: {first.message}") if first else (1, "does not fit the schema")


def _loose_text(element: etree._Element) -> bool:
    texts = [element.text, *(child.tail for child in element)]
    return any(text and text.strip() for text in texts)


def _line(element: etree._Element) -> int:
    return int(element.sourceline or 0)


def _name(element: etree._Element) -> str:
    """The tag's name for a sentence, short and printable."""
    return quoted(str(element.tag))[1:-1] if isinstance(element.tag, str) else "?"
