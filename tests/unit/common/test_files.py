"""Places on the disk: private, short, and never outside their root."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.files import confine, runtime_dir, write_private


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "x\0y", "out/x"])
def test_paths_that_lead_out_of_their_root_are_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "out").symlink_to("/etc")
    with pytest.raises(ConfigError):
        confine(tmp_path, path)


@pytest.mark.parametrize("path", ["", "a", "a/b", "./a", "in/x"])
def test_paths_inside_are_what_they_say(tmp_path: Path, path: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "in").symlink_to("a")
    assert tmp_path.resolve() in (confine(tmp_path, path), *confine(tmp_path, path).parents)


def test_the_runtime_directory_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))
    (tmp_path / "run").mkdir(mode=0o755)
    assert stat.S_IMODE(runtime_dir().stat().st_mode) == 0o700


def test_a_runtime_directory_too_deep_for_sockets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 100)
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(deep))
    with pytest.raises(ConfigError, match="too long to hold sockets: it may have 69 bytes"):
        runtime_dir()
    assert not deep.exists()


def test_private_files_are_private_and_whole(tmp_path: Path) -> None:
    write_private(tmp_path / "f", b"secret")
    assert (tmp_path / "f").read_bytes() == b"secret"
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
