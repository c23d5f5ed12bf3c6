from __future__ import annotations

from pathlib import Path

import pytest

from vm_images import tools
from vm_images.tools import BuildError, find_tool, remove_after, run


def test_missing_tool_names_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tools, "_SYSTEM_PATH", str(tmp_path))
    with pytest.raises(BuildError, match="mke2fs") as caught:
        find_tool("mke2fs")
    assert caught.value.hint == "apt install e2fsprogs"


def failure(stderr: str) -> BuildError:
    with pytest.raises(BuildError) as caught:
        run(["sh", "-c", 'printf "%s" "$0" >&2; exit 3', stderr], "doing it")
    return caught.value


def test_the_first_error_is_told() -> None:
    error = failure("Setting up x\nE: no such package y\nE: mmdebstrap failed to run\n")
    assert str(error) == "doing it: sh ended with status 3: E: no such package y"


def test_the_last_line_is_told_where_no_line_is_an_error() -> None:
    assert str(failure("one\ntwo\n")).endswith("two")
    assert str(failure("")).endswith("it gave no reason")


def test_no_network_and_full_disk() -> None:
    assert "network" in failure("E: Failed to fetch http://x.test/ Could not resolve 'x.test'").hint
    assert "disk is full" in str(failure("tar: write: No space left on device"))


def test_deadline() -> None:
    with pytest.raises(BuildError, match="did not end within"):
        run(["sleep", "5"], "waiting", timeout=0.1)


def test_caller_has_no_influence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("SECRET", "x")
    output = run(["env"], "looking").decode()
    assert "LC_ALL=C.UTF-8" in output
    assert "SECRET" not in output


def test_directory_for_a_time(tmp_path: Path) -> None:
    with pytest.raises(KeyError), remove_after(tmp_path / "d") as place:
        (place / "sub").mkdir()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
