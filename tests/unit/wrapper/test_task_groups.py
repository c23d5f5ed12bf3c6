"""A task's control group is in the ledger before it exists, and goes when its wrapper cannot remove it any more.

With directories for the kernel's: most computers do not let us make groups. `test_real` does where it may.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.cgroup import own_group
from host_agent.ledger import sweep
from host_agent.process_identity import Identity
from host_agent.wrapper.leftovers import PROCESSES_FILE, Leftovers
from host_agent.wrapper.task_groups import HostGroup, groups_dir, sweep_groups

DEAD: Identity = [2**22 - 1, 1.0]


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))


def entries() -> list[str]:
    return sorted(path.name for path in groups_dir().iterdir())


def forge_owner(owner: Identity) -> None:
    for file in groups_dir().iterdir():
        file.write_text(json.dumps({**json.loads(file.read_text()), "owner": owner}))


def test_the_entry_is_there_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[list[str]] = []
    real = Path.mkdir

    def mkdir(self: Path, *words: object, **named: object) -> None:
        if self.parent == tmp_path / "parent":
            there.append(entries())
        real(self, *words, **named)  # type: ignore[arg-type]

    (tmp_path / "parent").mkdir()
    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(HostGroup, "cpu_seconds", lambda self: 0.0)
    monkeypatch.setattr(os, "access", lambda *_: True)
    group = HostGroup.for_task(tmp_path / "parent")
    assert group is not None
    assert there == [[group.path.name]]
    group.remove()
    assert entries() == []


def test_where_no_group_can_be_made_no_entry_is_left(tmp_path: Path) -> None:
    (tmp_path / "parent").mkdir()
    assert HostGroup.for_task(tmp_path / "parent") is None, "it has no cpu.stat"
    assert HostGroup.for_task(tmp_path / "missing") is None
    assert entries() == []


def test_without_a_ledger_there_is_no_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "file" / "run"))
    assert HostGroup.for_task(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_only_what_is_ours_and_dead_is_removed(tmp_path: Path) -> None:
    for name in ("vmwrapper-1-aa", "precious"):
        (tmp_path / name).mkdir()
        (groups_dir() / name).write_text(json.dumps({"owner": DEAD, "path": str(tmp_path / name)}))
    (groups_dir() / "torn").write_text("{")
    assert sweep() == [f"removed the control group {tmp_path / 'vmwrapper-1-aa'}"]
    assert not (tmp_path / "vmwrapper-1-aa").exists()
    assert (tmp_path / "precious").is_dir()
    assert entries() == ["precious", "torn"]


def test_real(tmp_path: Path) -> None:
    """With a wrapper and its leader gone, the group is all that holds what the task started."""
    group = HostGroup.for_task()
    if group is None:
        parent = own_group()
        assert parent is None or not os.access(parent, os.W_OK), "it may be made here"
        return
    with subprocess.Popen(["sleep", "600"], preexec_fn=group.enter) as program:
        assert group.processes() == [program.pid]
        assert sweep_groups() == [], "its owner lives"
        forge_owner(DEAD)
        (tmp_path / PROCESSES_FILE).write_text("")
        Leftovers(tmp_path).end_all()
        assert program.wait(60) < 0
    assert not group.path.exists()
    assert entries() == []


def test_of_a_killed_wrapper(tmp_path: Path) -> None:
    """Every process of a job is killed; the next sweep finds the group."""
    if (probe := HostGroup.for_task()) is None:
        return
    probe.remove()
    (tmp_path / "job.xml").write_text(
        "<job_desc><task><application>sleep</application><command_line>600</command_line></task></job_desc>"
    )
    words = [sys.executable, "-m", "host_agent.wrapper.main"]
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.DEVNULL) as wrapper:
        until = time.monotonic() + 60
        while not any(HostGroup(Path(json.loads(each.read_text())["path"])).processes() for each in entry_files()):
            assert time.monotonic() < until
            assert wrapper.poll() is None
            time.sleep(0.02)
        (group,) = [Path(json.loads(each.read_text())["path"]) for each in entry_files()]
        wrapper.kill()
    assert sweep() == [f"removed the control group {group}"]
    assert not group.exists()


def entry_files() -> list[Path]:
    return [path for path in groups_dir().iterdir() if not path.name.endswith(".new")]
