"""What `--install` leaves on each kind of machine, in a root file system where nothing is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from guest_agent import service
from guest_agent.service import Init, Machine, find_init, install, uninstall


@pytest.fixture
def source(tmp_path: Path) -> Path:
    place = tmp_path / "source"
    (place / "guest_agent").mkdir(parents=True)
    (place / "start.py").write_text("print('start')\n")
    (place / "guest_agent" / "__init__.py").write_text("")
    return place


@pytest.fixture
def root(tmp_path: Path) -> Path:
    place = tmp_path / "root"
    (place / "etc").mkdir(parents=True)
    (place / "etc" / "passwd").write_text("vmwrapper:x:1000:1000::/home/vmwrapper:/bin/sh\n")
    return place


def listing(root: Path) -> dict[str, str]:
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(root))] = f"-> {path.readlink()}"
        elif path.is_file() and path.suffix != ".pyc":
            found[str(path.relative_to(root))] = path.read_text()
    return found


@pytest.mark.parametrize("init", list(Init))
def test_again_changes_nothing_and_uninstall_takes_all_away(
    root: Path, source: Path, init: Init, capsys: pytest.CaptureFixture[str]
) -> None:
    if init in (Init.SYSV, Init.BUSYBOX):
        (root / "etc" / "inittab").write_text("::sysinit:/etc/init.d/rcS\n")
    before = listing(root)
    machine = Machine(root, init)
    install(machine, source)
    installed = listing(root)
    assert "usr/lib/vmwrapper-guest-agent/start.py" in installed
    assert list((root / service.PLACE).rglob("*.pyc"))
    install(machine, source)
    assert listing(root) == installed
    assert "installed already" in capsys.readouterr().out
    uninstall(machine)
    assert listing(root) == before
    uninstall(machine)
    assert "was not installed" in capsys.readouterr().out


def test_a_new_version_replaces_the_old_one(root: Path, source: Path) -> None:
    machine = Machine(root, Init.SYSTEMD)
    install(machine, source)
    (source / "start.py").write_text("print('new')\n")
    install(machine, source)
    assert "new" in (root / service.PLACE / "start.py").read_text()
    assert [path.name for path in (root / service.PLACE).parent.iterdir()] == ["vmwrapper-guest-agent"]


def test_each_kind_starts_it_again(root: Path, source: Path) -> None:
    install(Machine(root, Init.SYSTEMD), source)
    assert "Restart=always" in (root / service.UNIT).read_text()
    assert (root / service.WANTED).is_symlink()
    install(Machine(root, Init.OPENRC), source)
    assert "supervise-daemon" in (root / service.OPENRC).read_text()
    assert (root / service.OPENRC).stat().st_mode & 0o111
    install(Machine(root, Init.SYSV), source)
    assert "vmw:2345:respawn:" in (root / service.INITTAB).read_text()
    install(Machine(root, Init.BUSYBOX), source)
    table = (root / service.INITTAB).read_text()
    assert table.count(":respawn:") == 1 and "\n:::respawn:" not in table


def test_which_init_is_here(root: Path) -> None:
    assert find_init(root) is Init.OTHER
    (root / "sbin").mkdir()
    (root / "sbin" / "init").symlink_to("busybox")
    assert find_init(root) is Init.BUSYBOX
    (root / "sbin" / "init").unlink()
    (root / "etc" / "inittab").touch()
    assert find_init(root) is Init.SYSV
    (root / "sbin" / "openrc-run").touch()
    assert find_init(root) is Init.OPENRC
    (root / "run" / "systemd" / "system").mkdir(parents=True)
    assert find_init(root) is Init.SYSTEMD
