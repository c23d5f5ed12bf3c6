"""Which programs a job may start on a volunteer's computer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from host_agent.wrapper.boinc.runtime import InitData
from host_agent.wrapper.job import JobError, load_job
from host_agent.wrapper.resolve import Macros
from host_agent.wrapper.signed import SignedFiles, check_programs

TASK = "<task><application>{}</application></task>"
DAEMON = "sh</application><daemon/></task><task><application>worker"


@pytest.fixture
def slot(tmp_path: Path) -> Path:
    """A client's directory: a project with a signed program and an unsigned file, and a slot."""
    project = tmp_path / "projects" / "example.org"
    project.mkdir(parents=True)
    for name in ("worker_1", "input_7"):
        (project / name).write_text(f"#!/bin/sh\necho {name}\n")
        (project / name).chmod(0o755)
    slot = tmp_path / "slots" / "0"
    slot.mkdir(parents=True)
    return slot


def link(slot: Path, name: str, physical: str) -> None:
    (slot / name).write_text(f"<soft_link>../../projects/example.org/{physical}</soft_link>\n")


def check(slot: Path, *applications: str, app_files: tuple[str, ...] = ("worker_1", "vmwrapper_1")) -> None:
    (slot / "job.xml").write_text(f"<job_desc>{''.join(map(TASK.format, applications))}</job_desc>")
    project = slot.parents[1] / "projects" / "example.org"
    given = InitData(standalone=False, project_dir=str(project), app_files=app_files)
    check_programs(load_job(slot / "job.xml"), SignedFiles.of(slot, given), Macros(str(project), slot=str(slot)))


def test_a_link_to_a_signed_file(slot: Path) -> None:
    link(slot, "worker", "worker_1")
    check(slot, "worker", "./worker", "$PROJECT_DIR/worker_1")


def test_a_symbolic_link_and_a_copy(slot: Path) -> None:
    project = slot.parents[1] / "projects" / "example.org"
    (slot / "linked").symlink_to(project / "worker_1")
    (slot / "copied").write_bytes((project / "worker_1").read_bytes())
    check(slot, "linked", "copied")


@pytest.mark.parametrize("name", ["input", "own", "sh", "$PROJECT_DIR/input_7", "linked", "named"])
def test_everything_else_is_refused(slot: Path, name: str) -> None:
    link(slot, "input", "input_7")
    (slot / "own").write_text("#!/bin/sh\n")
    (slot / "own").chmod(0o755)
    (slot / "linked").symlink_to("/bin/sh")
    (slot / "elsewhere").mkdir()
    (slot / "elsewhere" / "worker_1").write_text("a file of the same name")
    (slot / "named").symlink_to(slot / "elsewhere" / "worker_1")
    link(slot, "worker", "worker_1")
    with pytest.raises(JobError) as caught:
        check(slot, "worker", name)
    assert f"task 2 ({name}): {name!r} is not a signed file of the application version" in str(caught.value)
    assert caught.value.line == 1


@pytest.mark.parametrize("kind", ["unzip_task", "VMmanage_task"])
def test_all_kinds_of_tasks_are_checked(slot: Path, kind: str) -> None:
    link(slot, "worker", "worker_1")
    extra = f"worker</application></task><{kind}><application>sh</application></{kind}><task><application>worker"
    with pytest.raises(JobError, match="not a signed file"):
        check(slot, extra)


def test_daemons_are_checked_and_tasks_in_a_vm_are_not(slot: Path) -> None:
    link(slot, "worker", "worker_1")
    with pytest.raises(JobError, match=r"daemon 1 \(sh\)"):
        check(slot, "worker", DAEMON)
    check(slot, "sh</application><virtualmachine>v</virtualmachine></task><task><application>worker")


def test_a_signed_job_may_start_what_it_says(slot: Path) -> None:
    project = slot.parents[1] / "projects" / "example.org"
    job = "<job_desc><task><application>sh</application></task></job_desc>"
    (project / "job_1").write_text(job)
    link(slot, "job.xml", "job_1")
    given = InitData(standalone=False, project_dir=str(project), app_files=("vmwrapper_1", "job_1"))
    parsed = load_job(Path(os.path.normpath(slot / "../../projects/example.org/job_1")))
    check_programs(parsed, SignedFiles.of(slot, given), Macros(str(project), slot=str(slot)))


def test_nothing_is_checked_when_the_client_does_not_say(slot: Path) -> None:
    check(slot, "sh", app_files=())
