"""The worker example of 2009, as its slides print it: `make example-seed-2009` with a port of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import endpoints_dir
from host_agent.hypervisors.images import Image
from host_agent.ledger import ledger_dir
from tests.brokers import free_port

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 300

pytestmark = pytest.mark.vm


def test_the_worker_of_2009(tmp_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMWRAPPER_IMAGES", str(image.directory.parent))
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))
    slot = tmp_path / "slot"
    # Where there is no `python`, as on Debian, python3 takes its place.
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("python3", "java", "tar", "sh", "dirname", "env"):
        found = next(Path(folder) / name for folder in ("/usr/bin", "/bin") if (Path(folder) / name).exists())
        (programs / name).symlink_to(found)
    environment = {**os.environ, "PATH": f"{programs}:/usr/sbin:/sbin"}
    with_chirp = {**os.environ, "PATH": f"/usr/bin:{os.environ['PATH']}"}
    command = [sys.executable, "tools/run_seed_2009.py", "--slot", str(slot), "--port", str(free_port())]
    made = subprocess.run([*command, "--only-make"], cwd=ROOT, env=with_chirp, timeout=DEADLINE, check=False)
    assert made.returncode == 0
    for name in ("qemu-system-x86_64", "qemu-img", "zstd"):
        (programs / name).symlink_to(f"/usr/bin/{name}")
    done = subprocess.run(
        [*command, "--only-run"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "right, byte for byte" in done.stdout
    assert f"this host has no python, so it is run by {programs / 'python3'}" in said
    assert "finished with 0" in said
    assert not list(slot.glob("vm-*"))
    assert not list(ledger_dir().iterdir())
    assert not list(endpoints_dir().iterdir())
