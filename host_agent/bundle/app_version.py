"""A version of a BOINC application as the project's `update_versions` takes it, and its templates for workunits.

apps/<app>/<version>/<platform>[__<plan class>]/   files, version.xml, signatures
templates/<app>_in, <app>_out
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import attrs

from common.errors import ConfigError, VMwrapperError

from .content import BundleFile, Content
from .freeze import PROGRAM
from .launcher import API_VERSION, DIRECTORY, POSIX, windows
from .signing import PrivateKey, md5_of

PLATFORMS = ("x86_64-pc-linux-gnu", "windows_x86_64", "x86_64-apple-darwin", "arm64-apple-darwin")
LONGEST_NAME = 200  # of a file; clients and servers have 255 bytes for it and for what they add
_APP = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}\Z")
_VERSION = re.compile(r"(\d{1,4})\.(\d\d)\Z")
_PLAN_CLASS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_]{0,63}\Z")
MAX_RESULT_BYTES = 100_000_000


@attrs.frozen
class AppVersion:
    """Which version of which application, for which computers. ConfigError for names that BOINC would not take."""

    app: str
    version: str
    platform: str
    plan_class: str = ""

    def __attrs_post_init__(self) -> None:
        if not _APP.match(self.app):
            raise ConfigError(f"{self.app!r} cannot be the name of an application", "letters, digits, _ and -")
        if not _VERSION.match(self.version):
            raise ConfigError(f"{self.version!r} is not a version of an application", "such as 1.00 or 2.13")
        if self.platform not in PLATFORMS:
            raise ConfigError(f"there is no platform {self.platform!r}", f"there are: {', '.join(PLATFORMS)}")
        if self.plan_class and (not _PLAN_CLASS.match(self.plan_class) or "__" in self.plan_class):
            raise ConfigError(f"{self.plan_class!r} cannot be a plan class", "letters, digits and _, but not __")

    @property
    def directory(self) -> Path:
        """Below the project's directory."""
        return Path("apps", self.app, self.version, self.platform + (f"__{self.plan_class}" if self.plan_class else ""))

    def physical(self, file: BundleFile) -> str:
        """A file's name in the project: never the same for two versions, because files never change there."""
        prefix = "_".join(filter(None, (self.app, self.version, self.platform, self.plan_class)))
        if file.main:
            return prefix + Path(file.logical).suffix  # Windows starts what ends with .exe
        return f"{prefix}_{file.logical.replace('/', '_')}"


def program_files(frozen: Path, platform: str) -> Iterator[BundleFile]:
    """The frozen wrapper: the launcher, which is the main program, and what it starts."""
    on_windows = platform.startswith("windows")
    program = frozen / (f"{PROGRAM}.exe" if on_windows else PROGRAM)
    if not program.is_file():
        raise ConfigError(f"there is no frozen {program.name} in {frozen}", "vmctl bundle --freeze-to DIR makes one")
    if on_windows:
        yield BundleFile("launcher.exe", windows(), executable=True, main=True)
    else:
        yield BundleFile("launcher", POSIX, executable=True, main=True)
    for path in sorted(frozen.rglob("*")):
        if path.is_file():
            logical = f"{DIRECTORY}/{path.relative_to(frozen).as_posix()}"
            yield BundleFile(logical, path, executable=path == program, packed=True)


def write(
    project: Path, version: AppVersion, files: Iterable[BundleFile], content: Content, key: PrivateKey | None
) -> Path:
    """The application version and its templates, whole or not at all. Returns the version's directory."""
    place = project / version.directory
    if place.exists():
        raise ConfigError(f"{place} exists already", "files of a BOINC project never change: take a higher --version")
    named = _named(version, [*files, *content.files])
    new = place.with_name(f".{place.name}.{os.getpid()}.new")
    try:
        new.mkdir(parents=True)
        for name, file in named.items():
            _write_file(new / name, file)
            if key is not None:
                (new / f"{name}.sig").write_text(key.sign(md5_of(new / name)), "ascii")
        (new / "version.xml").write_text(version_xml(named), "utf-8")
        new.rename(place)
    except OSError as error:
        raise VMwrapperError(
            f"{place} cannot be written: {error.strerror}", "is there space, and may you write?"
        ) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    _write_templates(project / "templates", version.app, content)
    return place


def _named(version: AppVersion, files: Sequence[BundleFile]) -> dict[str, BundleFile]:
    named: dict[str, BundleFile] = {}
    logical: set[str] = set()
    for file in files:
        name = version.physical(file)
        if file.logical in logical or name in named:
            raise ConfigError(f"two files would be {file.logical} in the slot", "rename one of them")
        if len(name) > LONGEST_NAME:
            raise ConfigError(
                f"the name {name} is longer than {LONGEST_NAME} characters", "shorten the file's own name"
            )
        logical.add(file.logical)
        named[name] = file
    return named


def _write_file(path: Path, file: BundleFile) -> None:
    if isinstance(file.source, bytes):
        path.write_bytes(file.source)
    else:
        shutil.copyfile(file.source, path)
    path.chmod(0o755 if file.executable else 0o644)


def version_xml(named: dict[str, BundleFile]) -> str:
    """What `update_versions` reads. The main program needs no name in the slot: clients start it where it is."""
    parts = ["<version>\n"]
    for name, file in named.items():
        parts.append(f"  <file>\n    <physical_name>{escape(name)}</physical_name>\n")
        if file.main:
            parts.append("    <main_program/>\n")
        else:
            parts.append(f"    <logical_name>{escape(file.logical)}</logical_name>\n")
            parts += ["    <copy_file/>\n"] if file.copied else []
        parts += ["    <gzip/>\n"] if file.packed else []
        parts.append("  </file>\n")
    parts.append(f"  <api_version>{API_VERSION}</api_version>\n  <is_wrapper/>\n</version>\n")
    return "".join(parts)


def input_template(content: Content) -> str:
    """The template of a workunit."""
    infos = "".join("  <file_info/>\n" for _ in content.inputs)
    refs = "".join(
        f"    <file_ref>\n      <open_name>{escape(name)}</open_name>\n{_copied(copied)}    </file_ref>\n"
        for name, copied in content.inputs
    )
    return (
        f"<input_template>\n{infos}  <workunit>\n{refs}"
        "    <!-- How much work it is: set these to what your program takes. -->\n"
        "    <rsc_fpops_est>1e12</rsc_fpops_est>\n    <rsc_fpops_bound>1e15</rsc_fpops_bound>\n"
        "    <rsc_memory_bound>1e9</rsc_memory_bound>\n    <rsc_disk_bound>4e9</rsc_disk_bound>\n"
        "    <delay_bound>604800</delay_bound>\n  </workunit>\n</input_template>\n"
    )


def output_template(content: Content) -> str:
    """The template of a result."""
    infos = "".join(
        f"  <file_info>\n    <name><OUTFILE_{number}/></name>\n    <generated_locally/>\n    <upload_when_present/>\n"
        f"    <max_nbytes>{MAX_RESULT_BYTES}</max_nbytes>\n    <url><UPLOAD_URL/></url>\n  </file_info>\n"
        for number in range(len(content.outputs))
    )
    refs = "".join(
        f"    <file_ref>\n      <file_name><OUTFILE_{number}/></file_name>\n"
        f"      <open_name>{escape(name)}</open_name>\n{_copied(True)}    </file_ref>\n"
        for number, name in enumerate(content.outputs)
    )
    return f"<output_template>\n{infos}  <result>\n{refs}  </result>\n</output_template>\n"


def _copied(yes: bool) -> str:
    return "      <copy_file/>\n" if yes else ""


def _write_templates(place: Path, app: str, content: Content) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for name, text in ((f"{app}_in", input_template(content)), (f"{app}_out", output_template(content))):
        new = place / f".{name}.{os.getpid()}.new"
        new.write_text(text, "utf-8")
        new.replace(place / name)
