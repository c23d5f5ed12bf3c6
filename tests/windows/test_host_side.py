"""The wrapper and the host agent on Windows: what runs is a real Python for Windows, under wine."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest

from .wine import ROOT, Wine, windows_path

WORKER = ROOT / "examples" / "worker"
# The host part of the worker example; what its VM makes of the input is here already, and `tar` is not part of wine.
JOB = """<job_desc>
  <unzip_input><zipfilename>worker-input.zip</zipfilename></unzip_input>
  <task>
    <application>./prepare it.cmd</application>
    <command_line>"two words" boinc_resolve(in) $PWD</command_line>
    <stdout_filename>stdout_prepare</stdout_filename>
  </task>
  <task>
    <application>./summary.py</application><stdout_filename>stdout_summary</stdout_filename><command_line>in</command_line>
  </task>
  <task>
    <application>summary.py</application><exec_dir>below it</exec_dir><setenv>PYTHONIOENCODING=utf-8</setenv>
    <stdin_filename>in</stdin_filename><stdout_filename>stdout_below</stdout_filename>
    <command_line>deep</command_line>
  </task>
</job_desc>
"""
BATCH = b"@echo off\r\necho 1=%1\r\necho 2=%2\r\necho 3=%3\r\n"
IN_VM = """<job_desc><task>
  <virtualmachine>CernVM</virtualmachine><application>./worker.py</application><copy_app_to_VM>1</copy_app_to_VM>
</task></job_desc>
"""
SUMMARY = "3 lines, 138 bytes, SHA-256 "


def run(wine: Wine, slot: Path, **environment: str) -> tuple[int, str]:
    done = wine.run(wine.argv("-m", "host_agent.wrapper.main"), slot, environment=environment)
    return done.returncode, done.stdout + done.stderr


def test_the_host_part_of_the_example(wine: Wine, tmp_path: Path) -> None:
    slot = tmp_path / "a slot"
    (slot / "below it").mkdir(parents=True)
    (slot / "job.xml").write_text(JOB)
    (slot / "prepare it.cmd").write_bytes(BATCH)
    (slot / "below it" / "deep").write_bytes((WORKER / "in").read_bytes())
    shutil.copy(WORKER / "summary.py", slot)
    with zipfile.ZipFile(slot / "worker-input.zip", "w") as archive:
        archive.write(WORKER / "in", "in")
    status, said = run(wine, slot)
    assert status == 0, said
    assert (slot / "boinc_finish_called").read_text().startswith("0")
    assert (slot / "stdout_prepare").read_text().split("\n") == [
        '1="two words"',
        '2="in"',
        f'3="{windows_path(slot)}"',
        "",
    ]
    assert (slot / "stdout_summary").read_text().startswith(f"in: {SUMMARY}")
    assert (slot / "stdout_below").read_text().startswith(f"deep: {SUMMARY}")


def test_a_host_agent_starts_listens_and_says_what_is_missing(wine: Wine, tmp_path: Path) -> None:
    """Broker, file service and control interface come up; the wrapper asks for a VM, of which the image is missing."""
    (tmp_path / "job.xml").write_text(IN_VM)
    shutil.copy(WORKER / "worker.py", tmp_path)
    status, said = run(wine, tmp_path, VMWRAPPER_HYPERVISOR="virtualbox", VMWRAPPER_RUNTIME=windows_path(tmp_path))
    log = (tmp_path / "host-agent.log").read_text() if (tmp_path / "host-agent.log").exists() else ""
    assert status == 208, said + log
    assert "the virtual machine could not be started: there is no guest image debian-minimal" in said
    assert "is connected to its broker" in log
    assert "Traceback" not in said + log


@pytest.mark.parametrize("check", ["check_runtime", "check_tasks"])
def test_under_the_eyes_of_a_client(wine: Wine, check: str) -> None:
    done = wine.run(wine.argv("-m", f"tests.windows.{check}"), ROOT, deadline_s=240.0)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok: ") >= 7, done.stdout


@pytest.mark.parametrize("driver", ["qemu", "virtualbox"])
def test_the_drivers_of_hypervisors_without_any(wine: Wine, tmp_path: Path, driver: str) -> None:
    """QEMU is played by a Python, VirtualBox by a stand-in of its bindings."""
    environment = {"VMWRAPPER_RUNTIME": windows_path(tmp_path / "run")}
    words = wine.argv("-m", f"tests.windows.check_{driver}", windows_path(tmp_path))
    done = wine.run(words, ROOT, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok: ") == 5, done.stdout


def test_the_processes_of_the_system_below_wine_are_not_ours(wine: Wine) -> None:
    """Wine shows its /proc. A number there is another process's."""
    code = "from host_agent.process_identity import start_mark; print([n for n in range(500) if start_mark(n)])"
    done = wine.run(wine.argv("-c", code), ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
