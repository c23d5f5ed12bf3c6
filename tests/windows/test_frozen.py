"""The frozen `vmwrapper.exe`, under wine: what a volunteer with Windows gets, and runs without any Python."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from host_agent.bundle.app_version import AppVersion, program_files, write
from host_agent.bundle.content import sort_job
from tests.system.agent_process import AgentProcess

from .frozen import frozen_for_windows
from .test_host_side import BATCH, SUMMARY, WORKER
from .wine import ROOT, WINE, Wine, windows_path
from .wine_host_agent import ARGV

APP = AppVersion("worker", "1.00", "windows_x86_64")
JOB = """<job_desc>
  <task>
    <application>./prepare it.cmd</application><command_line>"two words" in</command_line>
    <stdout_filename>stdout_prepare</stdout_filename>
  </task>
  <task>
    <application>./summary.py</application><stdout_filename>stdout_summary</stdout_filename><command_line>in</command_line>
  </task>
</job_desc>
"""


@pytest.fixture(scope="module")
def frozen(wine: Wine) -> Path:
    return frozen_for_windows(wine)


def bare(wine: Wine) -> dict[str, str]:
    """An environment that leads to no Python."""
    return {name: text for name, text in wine.environment.items() if not name.startswith("PYTHON")}


def test_a_bundle_s_main_program_runs_the_host_part_of_the_example(wine: Wine, frozen: Path, tmp_path: Path) -> None:
    """The slot is made as a client does it from version.xml, and the client starts the main program from elsewhere."""
    job = tmp_path / "job"
    job.mkdir()
    (job / "job.xml").write_text(JOB.replace("prepare it.cmd", "prepare.cmd"))
    (job / "prepare.cmd").write_bytes(BATCH)
    (job / "prepare.cmd").chmod(0o755)
    shutil.copy(WORKER / "summary.py", job)
    written = write(tmp_path / "project", APP, program_files(frozen, APP.platform), sort_job(job, ["in"]), None)
    place = tmp_path / "projects" / "example.org"  # where a client puts what it has downloaded
    shutil.copytree(written, place)
    slot = tmp_path / "slots" / "a slot"
    main = ""
    for file in ElementTree.parse(place / "version.xml").getroot().findall("file"):
        physical, logical = file.findtext("physical_name", ""), file.findtext("logical_name", "")
        if file.find("main_program") is not None:
            main = physical
        elif file.find("copy_file") is not None:
            (slot / logical).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(place / physical, slot / logical)
        else:
            (slot / logical).parent.mkdir(parents=True, exist_ok=True)
            (slot / logical).write_text(f"<soft_link>../../projects/example.org/{physical}</soft_link>\n")
    (slot / "in").write_bytes((WORKER / "in").read_bytes())
    wine.environment, before = bare(wine), wine.environment
    try:
        done = wine.run([str(WINE), str(place / main)], slot)
    finally:
        wine.environment = before
    said = (slot / "stderr.txt").read_text() if (slot / "stderr.txt").exists() else done.stderr
    assert done.returncode == 0, said
    assert (slot / "boinc_finish_called").read_text().startswith("0"), said
    assert (slot / "stdout_prepare").read_text().split("\n")[:2] == ['1="two words"', '2="in"']
    assert (slot / "stdout_summary").read_text().startswith(f"in: {SUMMARY}")


def test_the_c_library_of_python_is_in_it(frozen: Path) -> None:
    assert {"vcruntime140.dll", "vcruntime140_1.dll"} <= {path.name for path in frozen.iterdir()}


def test_a_client_suspends_resumes_and_ends_it(wine: Wine, frozen: Path) -> None:
    program = windows_path(frozen / "vmwrapper.exe")
    done = wine.run(wine.argv("-m", "tests.windows.check_tasks", program), ROOT, deadline_s=240.0)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok: ") >= 7, done.stdout


@pytest.fixture
def agent(wine: Wine, frozen: Path, tmp_path: Path) -> Iterator[AgentProcess]:
    """A host agent with a guest agent out of the frozen program."""
    argv = [str(WINE), str(frozen / "vmwrapper.exe"), "--vmwrapper-module", "guest_agent.main"]
    (tmp_path / "agent").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ARGV, json.dumps({"argv": argv, "environment": bare(wine)}))
        agent = AgentProcess(tmp_path / "agent", module="tests.windows.wine_host_agent")
        agent.start()
        try:
            agent.start_vm("windows")
            yield agent
        finally:
            agent.end()


def test_it_is_a_guest_agent_too(agent: AgentProcess) -> None:
    batch = agent.home("windows") / "turn.cmd"
    batch.write_bytes(b"@echo off\r\necho %~1\r\ncopy in out >nul\r\nexit /b 5\r\n")
    source, back, out = (agent.folder / name for name in ("source", "back", "out"))
    source.write_bytes(bytes(range(256)) * 1024)
    agent.call("put", vm="windows", source=str(source), destination="in")
    result = agent.call("run", vm="windows", argv=[windows_path(batch), "two words"], stdout=str(out))
    assert (result["outcome"], result["exit_code"]) == ("exited", 5)
    assert out.read_text().strip() == "two words"
    assert result["user_s"] + result["system_s"] >= 0
    agent.call("get", vm="windows", source="out", destination=str(back))
    assert back.read_bytes() == source.read_bytes()
