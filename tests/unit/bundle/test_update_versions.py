"""A bundle under the rules of `update_versions`, with which a project takes new versions of its applications.

BOINC's server is no package here, so its program itself does not run: this is what it does to a directory, step by
step, from reading it (BOINC's tools/update_versions of 2024).
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from xml.etree import ElementTree

import attrs
import pytest

from host_agent.bundle.app_version import PLATFORMS, AppVersion, program_files, write
from host_agent.bundle.content import sort_job
from host_agent.bundle.signing import PrivateKey
from tests.boinc.signing import Key

# Of the table `platform` that `make_project` fills.
KNOWN_PLATFORMS = {"x86_64-pc-linux-gnu", "windows_x86_64", "x86_64-apple-darwin", "arm64-apple-darwin"}
EMBEDDED = re.compile(rb"API_VERSION_([0-9]+\.[0-9]+\.[0-9]+)$", re.MULTILINE)
SHELL_SAFE = re.compile(r"[A-Za-z0-9_.+-]+\Z")  # it runs `cp NAME NAME` by a shell, and writes names into SQL


@attrs.define
class Listed:
    """A file of version.xml, or one that lies beside it."""

    physical: str
    logical: str = ""
    main: bool = False
    executable: bool = False
    present: bool = False
    signature: str = ""


@attrs.frozen
class Taken:
    number: int
    platform: str
    plan_class: str
    api_version: str
    is_wrapper: bool
    files: list[Listed]


def update_versions(project: Path, app: str) -> list[Taken]:
    """What the project would have in its tables afterwards. Raises AssertionError with its complaint."""
    taken = []
    for version in sorted(path for path in (project / "apps" / app).iterdir() if not path.name.startswith(".")):
        major, _, minor = version.name.partition(".")
        assert major.isdecimal(), "is not a version number; skipping"
        assert minor.isdecimal(), "is not a version number; skipping"
        places = sorted(path for path in version.iterdir() if not path.name.startswith("."))
        taken += [_version(place, int(minor) + 100 * int(major)) for place in places]
    return taken


def _version(place: Path, number: int) -> Taken:
    platform, *rest = place.name.split("__")
    assert platform in KNOWN_PLATFORMS, "no such platform"
    root = ElementTree.parse(place / "version.xml").getroot()
    files = [
        Listed(
            (each.findtext("physical_name") or "").strip(),
            (each.findtext("logical_name") or "").strip(),
            each.find("main_program") is not None,
        )
        for each in root.findall("file")
    ]
    for path in sorted(place.iterdir()):
        if path.name.startswith(".") or path.name == "version.xml" or path.name.endswith(".sig") or path.is_dir():
            continue
        found = next((each for each in files if each.physical == path.name), None)
        if found is None:
            files.append(found := Listed(path.name))
        signature = path.with_name(path.name + ".sig")
        assert signature.is_file(), f"no .sig file for {path.name}, and no code signing private key"
        found.signature = signature.read_text("ascii")
        found.executable = bool(path.stat().st_mode & 0o100)
        found.present = True
    assert all(each.present for each in files), "is listed in version.xml but not present"
    mains = [each for each in files if each.main]
    assert len(mains) == 1, "exactly one file is the main program"
    api_version = (root.findtext("api_version") or "").strip()
    embedded = EMBEDDED.search((place / mains[0].physical).read_bytes())
    assert embedded is not None
    assert embedded[1].decode() == api_version, "an old project reads another API version than a new one"
    return Taken(number, platform, rest[0] if rest else "", api_version, root.find("is_wrapper") is not None, files)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    directory = tmp_path / "job"
    (directory / "data").mkdir(parents=True)
    (directory / "job.xml").write_text(
        "<job_desc><task><application>./model</application><stdout_filename>out</stdout_filename></task></job_desc>"
    )
    (directory / "model").write_text("#!/bin/sh\n")
    (directory / "model").chmod(0o755)
    (directory / "data" / "table.txt").write_text("1")
    return directory


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_project_takes_what_was_bundled(tmp_path: Path, job: Path, platform: str) -> None:
    frozen = tmp_path / "frozen"
    (frozen / "lib").mkdir(parents=True)
    for name in ("vmwrapper", "vmwrapper.exe", "lib/library.zip"):
        (frozen / name).write_bytes(name.encode())
    key = Key()
    (tmp_path / "key").write_text(key.private())
    (tmp_path / "key").chmod(0o600)
    private = PrivateKey.load(tmp_path / "key")
    project = tmp_path / "project"
    for number, plan_class in (("1.00", ""), ("1.00", "vm_64"), ("2.13", "")):
        write(
            project,
            AppVersion("model", number, platform, plan_class),
            program_files(frozen, platform),
            sort_job(job),
            private,
        )
    taken = update_versions(project, "model")
    assert [(each.number, each.platform, each.plan_class) for each in taken] == [
        (100, platform, ""),
        (100, platform, "vm_64"),
        (213, platform, ""),
    ]
    staged: dict[str, str] = {}
    for version in taken:
        assert version.is_wrapper
        assert {"model", "data/table.txt", "job.xml", "vmwrapper/lib/library.zip"} <= {
            each.logical for each in version.files
        }
        assert {each.logical for each in version.files if each.executable} >= {"", "model"}
        name = "__".join(filter(None, (platform, version.plan_class)))
        place = project / "apps" / "model" / f"{version.number / 100:.2f}" / name
        for each in version.files:
            assert SHELL_SAFE.match(each.physical)
            # Files of all versions lie in one directory of the project, and never change there.
            digest = hashlib.md5((place / each.physical).read_bytes(), usedforsecurity=False).hexdigest()
            assert staged.setdefault(each.physical, digest) == digest
            assert len(each.signature.split()) == 5  # four lines of 32 bytes, and a dot
    assert len(staged) == sum(len(version.files) for version in taken)
