"""The guest agent as one file, on the oldest and the newest Python that it is for, with a real host agent."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.agent_file import measure
from vm_images.agent_file import make_agent_file
from vm_images.cache import Cache, default_cache

from ..pythons import other_pythons, python_of
from .agent_process import agent_process


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("agent-files")
    cache = Cache(default_cache())
    return {python: make_agent_file(place / f"agent-{python}.pyz", cache, python=python) for python in ("3.9", "3.10")}


@pytest.mark.parametrize(
    ("file", "python"), [("3.9", "3.9"), ("3.10", "newest"), *(("3.10", version) for version in other_pythons())]
)
def test_it_does_what_the_host_asks_for(
    files: dict[str, Path], file: str, python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = python_of(python)
    monkeypatch.setenv("VMWRAPPER_GUEST_AGENT", f"{program} {files[file]}")
    with agent_process(tmp_path) as agent:
        home = agent.start_vm("one")
        (tmp_path / "sent").write_bytes(b"words" * 100_000)
        agent.call("put", vm="one", source=str(tmp_path / "sent"), destination="here")
        assert (home / "here").read_bytes() == (tmp_path / "sent").read_bytes()
        ended = agent.call("run", vm="one", argv=["sh", "-c", "exit 7"])
        assert ended["exit_code"] == 7, ended


def test_it_is_small_and_the_same_each_time(files: dict[str, Path], tmp_path: Path) -> None:
    again = make_agent_file(tmp_path / "again.pyz", Cache(default_cache()), python="3.10")
    assert again.read_bytes() == files["3.10"].read_bytes()
    assert again.stat().st_size < 3_000_000
    with zipfile.ZipFile(again) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        assert "lib/guest_agent/main.py" in archive.namelist()


def test_what_it_takes_of_its_machine() -> None:
    """`python -m benchmarks agent_file` shows the figures. Its CPU time is held to that of its imports in this run."""
    found = measure(idle_s=5.0)
    assert found["resident_mb"] <= 35, found
    assert found["idle_percent"] <= 0.2, found
    assert found["ratio_cpu_to_imports"] <= 1.6, found


def test_another_python_is_told_which_file_to_use(files: dict[str, Path]) -> None:
    done = subprocess.run([sys.executable, files["3.9"], "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "this file is for Python 3.9" in done.stderr
    assert "Traceback" not in done.stderr
