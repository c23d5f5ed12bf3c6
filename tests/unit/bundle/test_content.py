"""What of a job goes where, and what is refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import VMwrapperError
from host_agent.bundle.content import sort_job

JOB = """<job_desc>
  <task><application>./first</application><stdin_filename>in</stdin_filename><command_line>raw -f</command_line>
    <stdout_filename>middle</stdout_filename></task>
  <task><virtualmachine>box</virtualmachine><application>./second</application><copy_app_to_VM>1</copy_app_to_VM>
    <copy_file_to_VM>middle</copy_file_to_VM><copy_file_to_VM>big</copy_file_to_VM>
    <copy_file_from_VM>out</copy_file_from_VM></task>
</job_desc>
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    directory = tmp_path / "job"
    directory.mkdir()
    (directory / "job.xml").write_text(JOB)
    for name in ("first", "second"):
        (directory / name).write_text("#!/bin/sh\n")
        (directory / name).chmod(0o755)
    for name in ("in", "raw", "big", "table", "README.md", ".hidden"):
        (directory / name).write_text(name)
    return directory


def test_what_a_program_on_the_host_opens_is_copied_and_the_rest_is_linked(folder: Path) -> None:
    content = sort_job(folder, ["in"], with_image=False)
    copied = {file.logical: file.copied for file in content.files}
    assert copied == {"big": False, "first": False, "job.xml": False, "raw": True, "second": False, "table": True}
    assert content.inputs == (("in", False),)
    assert content.outputs == ("middle", "out")
    assert {file.logical for file in content.files if file.executable} == {"first", "second"}
    assert sort_job(folder, ["raw"], ["out"], with_image=False).inputs == (("raw", True),)


def test_an_image_that_is_not_there(folder: Path) -> None:
    with pytest.raises(VMwrapperError, match="there is no guest image nonesuch"):
        sort_job(folder, image="nonesuch")


def test_a_program_that_is_not_in_the_directory_is_noted(folder: Path) -> None:
    text = JOB.replace("./first", "cat")
    (folder / "job.xml").write_text(text)
    assert sort_job(folder, with_image=False).notes == ("job.xml:2: cat must be on every volunteer's computer",)


@pytest.mark.parametrize(
    ("inputs", "outputs", "sentence"),
    [
        (["../in"], [], "'../in' is not a plain file name"),
        ([], ["a/b"], "'a/b' is not a plain file name"),
        (["in", "in"], [], "--input in is given twice"),
        ([], ["out", "out"], "--output out is given twice"),
        ([], ["in"], "in is a result and also one of the job's files"),
    ],
)
def test_names_that_cannot_be(folder: Path, inputs: list[str], outputs: list[str], sentence: str) -> None:
    with pytest.raises(VMwrapperError) as error:
        sort_job(folder, inputs, outputs, with_image=False)
    assert sentence in str(error.value)


def test_files_that_cannot_be(folder: Path) -> None:
    (folder / "a b").touch()
    with pytest.raises(VMwrapperError, match="the name 'a b' cannot be sent to clients"):
        sort_job(folder, with_image=False)
    (folder / "a b").unlink()
    (folder / "big.sig").touch()
    with pytest.raises(VMwrapperError, match=r"'big\.sig' would be taken for a signature"):
        sort_job(folder, with_image=False)
    (folder / "big.sig").unlink()
    (folder / "link").symlink_to("nowhere")
    with pytest.raises(VMwrapperError, match="a link that leads nowhere"):
        sort_job(folder, with_image=False)


def test_a_file_that_is_missing_is_named_where_it_is_missed(folder: Path) -> None:
    (folder / "in").unlink()
    with pytest.raises(VMwrapperError, match=r"job.xml:2: .*there is no <stdin_filename> 'in'") as error:
        sort_job(folder, with_image=False)
    assert "--input" in error.value.hint
    sort_job(folder, ["in"], with_image=False)  # it comes with each workunit


@pytest.mark.parametrize("what", ["nothing", "no job"])
def test_a_directory_without_a_job(tmp_path: Path, what: str) -> None:
    directory = tmp_path / what
    if what == "no job":
        directory.mkdir()
    with pytest.raises(VMwrapperError, match=r"is not a directory|there is no job.xml in"):
        sort_job(directory)


def test_a_job_without_results(folder: Path) -> None:
    (folder / "job.xml").write_text("<job_desc><task><application>./first</application></task></job_desc>")
    with pytest.raises(VMwrapperError, match="names no result"):
        sort_job(folder)
