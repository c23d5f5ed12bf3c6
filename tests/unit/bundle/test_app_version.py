"""The directory of an application version: whole or not at all, and names that BOINC takes."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from common.errors import VMwrapperError
from host_agent.bundle.app_version import AppVersion, input_template, output_template, program_files, version_xml, write
from host_agent.bundle.content import BundleFile, Content
from host_agent.vmctl.main import main

LINUX = "x86_64-pc-linux-gnu"
VERSION = AppVersion("app", "1.00", LINUX)
CONTENT = Content((BundleFile("job.xml", b"<job_desc/>", copied=False),), (("in", True), ("big", False)), ("out",), ())


@pytest.fixture
def frozen(tmp_path: Path) -> Path:
    directory = tmp_path / "frozen"
    (directory / "lib").mkdir(parents=True)
    (directory / "vmwrapper").write_bytes(b"program")
    (directory / "lib" / "library.zip").write_bytes(b"library")
    return directory


def test_a_version_and_its_templates(tmp_path: Path, frozen: Path) -> None:
    place = write(tmp_path, AppVersion("app", "1.00", LINUX, "vm"), program_files(frozen, LINUX), CONTENT, None)
    assert place == tmp_path / "apps/app/1.00" / f"{LINUX}__vm"
    prefix = f"app_1.00_{LINUX}_vm"
    assert {path.name: path.stat().st_mode & 0o777 for path in place.iterdir()} == {
        prefix: 0o755,
        f"{prefix}_vmwrapper_vmwrapper": 0o755,
        f"{prefix}_vmwrapper_lib_library.zip": 0o644,
        f"{prefix}_job.xml": 0o644,
        "version.xml": 0o644,
    }
    root = ElementTree.parse(place / "version.xml").getroot()
    assert [file.findtext("physical_name") for file in root if file.find("main_program") is not None] == [prefix]
    assert {file.findtext("logical_name"): file.find("copy_file") is not None for file in root.findall("file")} == {
        None: False,
        "vmwrapper/vmwrapper": True,
        "vmwrapper/lib/library.zip": True,
        "job.xml": False,
    }
    assert root.findtext("api_version") == "8.0.0"
    assert root.find("is_wrapper") is not None
    assert sorted(path.name for path in (tmp_path / "templates").iterdir()) == ["app_in", "app_out"]


def test_templates_name_inputs_and_results_in_order() -> None:
    inputs = ElementTree.fromstring(input_template(CONTENT))
    assert len(inputs.findall("file_info")) == 2
    refs = inputs.findall("workunit/file_ref")
    assert [ref.findtext("open_name") for ref in refs] == ["in", "big"]
    assert [ref.find("copy_file") is not None for ref in refs] == [True, False]
    outputs = ElementTree.fromstring(output_template(CONTENT))
    assert outputs.find("file_info/name/OUTFILE_0") is not None
    assert outputs.findtext("result/file_ref/open_name") == "out"


@pytest.mark.parametrize("fault", ["two of a name", "unreadable", "too long"])
def test_nothing_is_left_of_a_version_that_failed(tmp_path: Path, frozen: Path, fault: str) -> None:
    files = list(program_files(frozen, LINUX))
    if fault == "two of a name":
        files.append(BundleFile("vmwrapper/lib/library.zip", b""))
    elif fault == "unreadable":
        files.append(BundleFile("other", tmp_path / "gone"))
    else:
        files.append(BundleFile("x" * 200, b""))
    with pytest.raises(VMwrapperError):
        write(tmp_path / "project", VERSION, files, CONTENT, None)
    assert not [path for path in (tmp_path / "project").rglob("*") if path.is_file()]
    assert not (tmp_path / "project" / VERSION.directory).exists()


def test_two_files_of_one_physical_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VMwrapperError, match="two files would be"):
        write(tmp_path, VERSION, [BundleFile("a/b", b"1"), BundleFile("a_b", b"2")], CONTENT, None)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("../app", "1.00", LINUX), "cannot be the name of an application"),
        (("app", "1.0.0", LINUX), "is not a version"),
        (("app", "1", LINUX), "is not a version"),
        (("app", "1.00", "amiga"), "there is no platform 'amiga'"),
        (("app", "1.00", LINUX, "a__b"), "cannot be a plan class"),
    ],
)
def test_names_that_boinc_would_not_take(words: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(VMwrapperError, match=sentence):
        AppVersion(*words)


def test_names_are_written_as_xml() -> None:
    text = version_xml({"a+b": BundleFile("a+b", b"")})
    assert ElementTree.fromstring(text).findtext("file/logical_name") == "a+b"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--platform", "windows_x86_64"], "the wrapper for windows_x86_64 cannot be frozen on this computer"),
        (["--platform", "windows_x86_64", "--frozen", "nowhere"], "there is no frozen vmwrapper.exe in nowhere"),
        (["--without", "everything"], "there is no optional part 'everything'"),
        (["--key", "nowhere"], "the key nowhere cannot be read"),
    ],
)
def test_the_command_says_it_in_one_sentence(
    tmp_path: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job"
    job.mkdir()
    (job / "job.xml").write_text(
        "<job_desc><task><application>cat</application><stdout_filename>out</stdout_filename></task></job_desc>"
    )
    assert main(["bundle", str(job), "--project", str(tmp_path / "project"), *words]) == 1
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert not (tmp_path / "project").exists()


def test_a_version_for_windows_has_a_program_that_starts_the_wrapper_in_the_slot(tmp_path: Path, frozen: Path) -> None:
    (frozen / "vmwrapper").rename(frozen / "vmwrapper.exe")
    version = AppVersion("app", "1.00", "windows_x86_64")
    place = write(tmp_path / "project", version, program_files(frozen, version.platform), CONTENT, None)
    launcher = (place / "app_1.00_windows_x86_64.exe").read_bytes()
    assert launcher.startswith(b"MZ")
    assert b"#!.\\vmwrapper\\vmwrapper.exe --vmwrapper-launched\r\n" in launcher
    assert (place / "app_1.00_windows_x86_64_vmwrapper_vmwrapper.exe").is_file()
