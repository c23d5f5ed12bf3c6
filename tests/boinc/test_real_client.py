"""Debian's BOINC client runs `vmwrapper` as it runs BOINC's own wrapper.

One client gets all the jobs of this module at once and runs them side by side; each test looks at one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import attrs
import psutil
import pytest

from host_agent.wrapper.exit_codes import Exit

from .conftest import Site, job, make_site, task
from .processes import TASK, WRAPPER, processes
from .project import Work

# A client's numbers for the state of a result.
COMPUTE_ERROR, UPLOADED, ABORTED = 3, 5, 6

COUNT = "while [ ! -e {gate} ]; do date +%s.%N >> ticks; sleep 0.1; done"

VM_TASK = """<task>
  <virtualmachine>CernVM</virtualmachine>
  <application>./work.py</application>
  <copy_app_to_VM>1</copy_app_to_VM>
  <copy_file_to_VM>in</copy_file_to_VM>
  <copy_file_from_VM>out</copy_file_from_VM>
  <stderr_filename>stderr_vm</stderr_filename>
</task>
"""


@attrs.frozen
class Everything:
    """The jobs of this module, under way."""

    site: Site
    gates: Path
    host: Work
    failing: Work
    suspended: Work
    aborted: Work
    talking: Work
    early: Work
    machine: Work

    def open(self, work: Work) -> None:
        """Let a job that waits at its gate go on."""
        (self.gates / work.name).touch()


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Iterator[Everything]:
    directory = tmp_path_factory.mktemp("real")
    site = make_site(directory, images=images)

    def count(name: str) -> str:
        return task(COUNT.format(gate=directory / name) + "; wc -l < ticks > lines")

    def send(name: str, *parts: str, outputs: tuple[str, ...] = (), command_line: str = "") -> Work:
        inputs = {"job.xml": job(*parts), "in": b"what comes in\n"}
        return site.project.send(Work(name, 100, inputs, outputs, command_line))

    to_upper = (
        task("cat boinc_resolve(in) > middle", "<weight>3</weight>"),
        task("tr a-z A-Z < middle; sleep 3", "<stdout_filename>out</stdout_filename>"),
    )
    made = Everything(
        site=site,
        gates=directory,
        host=send("host", *to_upper, outputs=("out",), command_line="--trickle 1"),
        failing=send("failing", task("echo this is why >&2; exit 7"), task("touch never")),
        suspended=send(
            "suspended",
            count("suspended"),
            task("cat lines", "<stdout_filename>out</stdout_filename>"),
            outputs=("out",),
        ),
        aborted=send("aborted", count("aborted"), outputs=("out",)),
        early=send(
            "early",
            task("trap 'echo so far > boinc_resolve(out); exit 0' TERM; while :; do touch ticks; sleep 0.1; done"),
            outputs=("out",),
        ),
        talking=site.project.send(Work("talking", 200, {}, ("early", "out"))),
        machine=send("machine", VM_TASK, outputs=("out",)),
    )
    try:
        site.start()
        site.client.attach(site.project.url)
        yield made
    finally:
        site.client.stop()
        site.project.close()


def test_suspend_and_resume_of_a_task(everything: Everything) -> None:
    site, work = everything.site, everything.suspended
    ticks = site.slot(work, "ticks") / "ticks"
    [shell, *_] = processes(ticks.parent, TASK)
    site.task(work, "suspend")
    site.wait_for_state(work, "SUSPENDED")
    site.client.wait(lambda: shell.status() == psutil.STATUS_STOPPED, "the task is stopped")
    size = ticks.stat().st_size
    site.task(everything.aborted, "suspend")  # the client has turned a few rounds when this one is suspended too
    site.wait_for_state(everything.aborted, "SUSPENDED")
    assert ticks.stat().st_size == size
    assert shell.status() == psutil.STATUS_STOPPED
    site.task(everything.aborted, "resume")
    site.task(work, "resume")
    site.wait_for_state(work, "EXECUTING")
    site.client.wait(lambda: ticks.stat().st_size > size, "the task goes on")
    everything.open(work)
    report = site.report(work)
    assert (report.exit_status, report.state) == (0, UPLOADED)
    assert int(site.project.uploads[work.output("out")]) > 0
    assert "suspended by the client" in report.stderr
    assert "resumed by the client" in report.stderr


def test_abort(everything: Everything) -> None:
    site, work = everything.site, everything.aborted
    slot = site.slot(work, "ticks")
    mine = processes(slot, TASK) + processes(slot, WRAPPER)
    assert len(mine) >= 2
    site.task(work, "abort")
    report = site.report(work)
    assert report.state == ABORTED
    assert report.exit_status != 0
    assert work.output("out") not in site.project.uploads
    assert not [each for each in mine if each.is_running()]


def test_a_host_job_of_two_tasks(everything: Everything) -> None:
    site, work = everything.site, everything.host
    report = site.report(work)
    assert (report.exit_status, report.state) == (0, UPLOADED)
    assert site.project.uploads[work.output("out")] == b"WHAT COMES IN\n"
    assert "task 2 (work.sh) ended with exit status 0" in report.stderr
    assert 0 < report.cpu_s < 10


def test_trickles_of_the_wrapper(everything: Everything) -> None:
    site, work = everything.site, everything.host
    site.report(work)
    texts = [text for result, text in site.project.trickles if result == work.result]
    assert texts
    assert all("<variety>cpu_time</variety>" in text for text in texts)


def test_a_failing_task(everything: Everything) -> None:
    site, work = everything.site, everything.failing
    report = site.report(work)
    assert (report.exit_status, report.state) == (Exit.CHILD_FAILED, COMPUTE_ERROR)
    assert "this is why" in report.stderr
    assert "task 1 (work.sh) ended with exit status 7" in report.stderr


def test_an_application_that_talks(everything: Everything) -> None:
    """Temporary exit, trickle up and down, intermediate upload and its status, graphics, what init_data.xml says."""
    site, work = everything.site, everything.talking

    def asked() -> bool:
        site.client.update(site.project.url)
        return any("is anybody there?" in text for _result, text in site.project.trickles)

    site.client.wait(asked, "the trickle-up arrived")
    assert site.project.uploads[work.output("early")] == b"early\n"
    urls = site.client.command("--get_tasks")
    assert "talking_0" in urls
    site.project.send_trickle_down(work.result, "<text>yes</text>")
    report = site.report(work)
    assert (report.exit_status, report.state) == (0, UPLOADED)
    assert "not in the mood" in site.client.log() or report.stderr == "\n\n"
    lines = dict(line.split(" ", 1) for line in site.project.uploads[work.output("out")].decode().splitlines())
    assert lines["upload"] == "0"
    assert "<text>yes</text>" in lines["answer"]
    assert lines["init"] == f"vmwrapper 200 {work.name} {work.result}"
    assert lines["user"] == "tester host 1"
    assert lines["files"] == "launcher_200talker"
    assert lines["client"].startswith("7.")
    upload = site.project.upload_times
    assert upload[work.output("early")] < upload[work.output("out")]


def test_the_project_ends_a_job_early(everything: Everything) -> None:
    site, work = everything.site, everything.early
    site.slot(work, "ticks")
    site.project.send_trickle_down(work.result, "<end_early/>")
    report = site.report(work)
    assert (report.exit_status, report.state) == (0, UPLOADED), report.stderr
    assert "the project wants the job to end now" in report.stderr
    assert site.project.uploads[work.output("out")] == b"so far\n"


@pytest.mark.vm
def test_a_job_with_a_task_in_a_virtual_machine(everything: Everything) -> None:
    site, work = everything.site, everything.machine
    report = site.report(work, deadline_s=180.0)
    assert (report.exit_status, report.state) == (0, UPLOADED), report.stderr
    assert site.project.uploads[work.output("out")] == b"WHAT COMES IN\n"
    assert report.cpu_s > 0
