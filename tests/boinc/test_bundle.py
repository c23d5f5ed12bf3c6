"""`vmctl bundle`, and then what a volunteer has: the real client with an empty PATH, and a root without Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from host_agent.bundle.elf import needed_glibc
from host_agent.bundle.freeze import GLIBC
from tests.boinc.signing import Key

from .conftest import ROOT, Site, make_site
from .project import APP, PLATFORM, Installed, Work
from .test_real_client import UPLOADED

JOB = """<job_desc>
  <task>
    <application>./prepare.py</application>
    <command_line>raw table.txt</command_line>
    <stdout_filename>middle</stdout_filename>
    <stderr_filename>stderr_prepare</stderr_filename>
  </task>
  <task>
    <virtualmachine>CernVM</virtualmachine>
    <application>./work.py</application>
    <copy_app_to_VM>1</copy_app_to_VM>
    <copy_file_to_VM>middle</copy_file_to_VM>
    <copy_file_from_VM>out</copy_file_from_VM>
    <stderr_filename>stderr_vm</stderr_filename>
  </task>
  <task>
    <application>./finish</application>
    <stdout_filename>last</stdout_filename>
  </task>
</job_desc>
"""
PREPARE = """#!/usr/bin/env python3
import json, pathlib, sys
print(json.dumps([pathlib.Path(name).read_text() for name in sys.argv[1:]]), sys.executable)
"""
WORK = '#!/usr/bin/env python3\nopen("out", "w").write(open("middle").read().upper())\n'
HOST_JOB = """<job_desc><task>
  <application>./prepare.py</application><command_line>raw</command_line><stdout_filename>out</stdout_filename>
</task></job_desc>
"""
# What a Linux system without Python has, as far as the launcher and the frozen wrapper go.
PROGRAMS = ("sh", "ls", "cat")


def folder(path: Path, job: str) -> Path:
    path.mkdir()
    (path / "job.xml").write_text(job)
    for name, text in (("prepare.py", PREPARE), ("work.py", WORK), ("finish", "#!/bin/sh\necho the end\n")):
        (path / name).write_text(text)
        (path / name).chmod(0o755)
    (path / "table.txt").write_text("of the application\n")
    return path


def bundle(directory: Path, project: Path, *words: str, images: Path) -> subprocess.CompletedProcess[str]:
    vmctl = [sys.executable, "-m", "host_agent.vmctl.main", "bundle"]
    argv: list[str | Path] = [*vmctl, directory, "--app", APP, "--project", project]
    environment = {**os.environ, "VMWRAPPER_IMAGES": str(images)}
    return subprocess.run([*argv, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@attrs.frozen
class Bundled:
    site: Site
    version: Installed
    said: str


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Iterator[Bundled]:
    directory = tmp_path_factory.mktemp("bundle")
    key = directory / "code_sign_private"
    key.write_text(Key().private())
    key.chmod(0o600)
    job = folder(directory / "job", JOB)
    done = bundle(job, directory / "project", "--version", "3.00", "--input", "raw", "--key", str(key), images=images)
    assert done.returncode == 0, done.stderr
    site = make_site(directory)
    version = Installed(300, directory / "project" / "apps" / APP / "3.00" / PLATFORM)
    site.project.install(version)
    yield Bundled(site, version, done.stdout + done.stderr)
    site.client.stop()
    site.project.close()


@pytest.mark.vm
def test_the_client_downloads_checks_and_runs_a_bundle_with_a_virtual_machine(bundled: Bundled) -> None:
    site = bundled.site
    # QEMU must be there; a Python is not found, and what finds no Python needs none.
    tools = site.client.directory.parent / "tools"
    tools.mkdir()
    for name in ("sh", "qemu-system-x86_64", "qemu-img", "zstd"):
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(found)
    site.environment.clear()
    site.environment.update(PATH=str(tools), VMWRAPPER_RUNTIME=str(site.client.directory.parent / "run"))
    work = site.project.send(Work("whole", 300, {"raw": b"of the workunit\n"}, ("out", "last"), copied=("raw",)))
    site.client.start(site.environment)
    site.client.attach(site.project.url)
    report = site.report(work, deadline_s=240.0)
    assert (report.exit_status, report.state) == (0, UPLOADED), report.stderr
    out = site.project.uploads[work.output("out")].decode()
    assert out.startswith('["OF THE WORKUNIT\\N", "OF THE APPLICATION\\N"]')
    assert out.strip().endswith("/VMWRAPPER/VMWRAPPER")  # the Python of the bundle
    assert site.project.uploads[work.output("last")] == b"the end\n"
    # The image was not copied into the slot, and what was made of it is where the next job finds it.
    assert list(site.client.directory.glob("projects/*/*_disk.qcow2"))
    assert list(site.client.directory.glob("projects/*/.templates/*"))


def test_nothing_in_it_needs_a_newer_glibc(bundled: Bundled) -> None:
    needs = {path.name: needed_glibc(path) for path in bundled.version.directory.iterdir()}
    found = {name: version for name, version in needs.items() if version is not None}
    assert len(found) > 20
    assert {name: version for name, version in found.items() if version > GLIBC} == {}


def test_everything_is_signed_and_named_once(bundled: Bundled) -> None:
    names = [file.findtext("physical_name", "") for file in bundled.version.files()]
    there = {path.name for path in bundled.version.directory.iterdir()} - {"version.xml"}
    assert there == {*names, *(f"{name}.sig" for name in names)}
    assert len(set(names)) == len(names)
    assert sum(file.find("main_program") is not None for file in bundled.version.files()) == 1
    assert all("3.00" in name for name in names)
    assert "finish" not in bundled.said  # no note about a program of its own


def test_a_host_without_python_runs_it(bundled: Bundled, tmp_path: Path) -> None:
    """In a root that holds a shell and the C library: what volunteers have, and less."""
    root = tmp_path / "root"
    slot = root / "slot"
    slot.mkdir(parents=True)
    for name in PROGRAMS:
        copy_program(Path(shutil.which(name) or ""), root)
    version = bundled.version
    for file in version.files():
        logical = file.findtext("logical_name", "")
        if file.find("copy_file") is not None or file.find("main_program") is not None:
            target = slot / (logical or "launcher")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(version.directory / file.findtext("physical_name", ""), target)
    shutil.copy(version.directory / f"{APP}_3.00_{PLATFORM}_prepare.py", slot / "prepare.py")
    (slot / "prepare.py").chmod(0o755)
    (slot / "job.xml").write_text(HOST_JOB)
    (slot / "raw").write_text("raw")
    assert not [path for path in root.rglob("*python*") if path.parent.name != "lib"]
    proc, dev = root / "proc", root / "dev"
    proc.mkdir()
    dev.mkdir()
    (dev / "null").touch()
    enter = ["unshare", "--mount", "--pid", "--fork", f"--mount-proc={proc}"]
    if os.geteuid() != 0:
        enter.insert(1, "--map-root-user")
    script = 'mount --bind /dev/null "$0/dev/null" && exec chroot "$0" /bin/sh -c "cd /slot && exec ./launcher"'
    done = subprocess.run(
        [*enter, "sh", "-c", script, root], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60
    )
    log = (slot / "stderr.txt").read_text() if (slot / "stderr.txt").exists() else ""
    assert done.returncode == 0, done.stderr + log
    assert (slot / "boinc_finish_called").read_text().startswith("0")
    assert (slot / "out").read_text() == '["raw"] /slot/vmwrapper/vmwrapper\n'


def copy_program(program: Path, root: Path) -> None:
    """A program with the libraries that it names, and those that the C library has besides."""
    linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    files = [Path(name) for name in re.findall(r"(/\S+)", linked)]
    for library in files[:]:
        if library.name.startswith("libc.so"):
            files += [
                library.with_name(f"lib{name}")
                for name in ("m.so.6", "dl.so.2", "pthread.so.0", "rt.so.1", "util.so.1")
            ]
    for path in files:
        target = root / path.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copy(path, target)
    (root / "bin").mkdir(exist_ok=True)
    shutil.copy(program, root / "bin" / program.name)


def test_a_version_that_exists_is_not_touched(bundled: Bundled, tmp_path: Path, images: Path) -> None:
    project = bundled.version.directory.parents[3]
    before = sorted(project.rglob("*"))
    done = bundle(folder(tmp_path / "job", HOST_JOB), project, "--version", "3.00", "--input", "raw", images=images)
    assert done.returncode == 1
    assert "exists already" in done.stderr
    assert "--version" in done.stderr
    assert sorted(project.rglob("*")) == before
