"""The example of a BOINC application as a process, and the client's end of its channels in the test."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from host_agent.wrapper.boinc import application
from host_agent.wrapper.boinc.application import Application, TemporaryExitError, run
from host_agent.wrapper.boinc.shared_memory import Channel
from host_agent.wrapper.boinc.testing import ClientSide

ROOT = Path(__file__).parents[4]
EXAMPLE = ROOT / "examples/boinc-application/primes.py"


def start(slot: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(EXAMPLE)], cwd=slot, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE
    )


def wait_for(what: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return int(fields[11]) + int(fields[12])


def test_the_example_without_a_client(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("5000")
    child = start(tmp_path)
    _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (0, b"")
    assert (tmp_path / "out").read_text() == "669\n"
    assert (tmp_path / "boinc_finish_called").read_text() == "0\n"


def test_the_example_is_suspended_and_ended_and_goes_on(tmp_path: Path) -> None:
    side = ClientSide(tmp_path, checkpoint_period=0.05)
    project = tmp_path / "in_1"
    project.write_text("120000")
    (tmp_path / "in").symlink_to(project)
    child = start(tmp_path)
    state = tmp_path / "state"
    wait_for(state.exists)
    side.control("<suspend/>")
    wait_for(lambda: not side.memory.full(Channel.PROCESS_CONTROL_REQUEST))
    wait_for(lambda: Path(f"/proc/{child.pid}/wchan").exists())
    before = state.read_text()
    used = cpu_ticks(child.pid)
    time.sleep(1)  # nothing may happen in it
    assert cpu_ticks(child.pid) - used <= 5
    assert state.read_text() == before
    side.control("<resume/>")
    wait_for(lambda: state.read_text() != before)
    side.control("<quit/>")
    _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (0, b"")
    assert not (tmp_path / "boinc_finish_called").exists()
    assert int(state.read_text().split()[0]) > int(before.split()[0])

    for file in tmp_path.glob("trickle_up*"):
        file.unlink()
    side.memory.take(Channel.TRICKLE_UP)
    side.memory.take(Channel.APP_STATUS)
    side.write_init_data(wu_cpu_time=1000.0)
    child = start(tmp_path)
    trickles = []

    def client() -> bool:
        if side.memory.take(Channel.TRICKLE_UP):
            trickles.append((tmp_path / "trickle_up.xml").read_text())
            (tmp_path / "trickle_up.xml").unlink()
        return child.poll() is not None

    wait_for(client)
    client()
    assert child.communicate()[1] == b""
    assert child.returncode == 0
    assert (tmp_path / "out").read_text() == "11301\n"
    assert (tmp_path / "boinc_finish_called").read_text() == "0\n"
    status = side.status() or ""
    assert "<fraction_done>1.000000e+00<" in status
    assert "<current_cpu_time>1.0" in status
    assert trickles[0].startswith("<variety>primes</variety>\n<below>")


def test_abort(tmp_path: Path) -> None:
    side = ClientSide(tmp_path)
    side.control("<abort/>")

    def main(app: Application) -> int:
        app.step(0.5)
        raise AssertionError("it went on")

    assert run(main, tmp_path) == application.ABORTED_BY_CLIENT
    assert not (tmp_path / "boinc_finish_called").exists()


def test_preferences_are_read_again_in_a_step(tmp_path: Path) -> None:
    side = ClientSide(tmp_path)

    def main(app: Application) -> int:
        side.write_init_data(checkpoint_period=7.0)
        app.step()
        return int(app.data.checkpoint_period_s)

    assert run(main, tmp_path) == 7


def test_a_temporary_exit(tmp_path: Path) -> None:
    def main(_app: Application) -> int:
        raise TemporaryExitError(60, "no licence is free")

    assert run(main, tmp_path) == 0
    assert (tmp_path / "boinc_temporary_exit").read_text() == "60\nno licence is free\n"


def test_an_error_of_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def main(_app: Application) -> int:
        raise RuntimeError("a bug")

    assert run(main, tmp_path) == 1
    assert (tmp_path / "boinc_finish_called").read_text() == "1\n"
    assert "a bug" in capsys.readouterr().err


def test_a_checkpoint_that_fails_is_none(tmp_path: Path) -> None:
    side = ClientSide(tmp_path, wu_cpu_time=500.0)

    def main(app: Application) -> int:
        with pytest.raises(OSError, match="disk full"), app.checkpoint():
            raise OSError("disk full")
        app.step(0.5)
        assert "<checkpoint_cpu_time>5.000000e+02<" in (side.status() or "")
        with app.checkpoint():
            pass
        app.step(0.6)
        assert "<checkpoint_cpu_time>5.000000e+02<" not in (side.status() or "")
        return 0

    assert run(main, tmp_path) == 0


def test_a_busy_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("host_agent.wrapper.boinc.lock_file.LockFile._try", lambda _self: False)

    def main(_app: Application) -> int:
        raise AssertionError("it ran")

    times = itertools.count(0, 40)
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    assert run(main, tmp_path) == 0
    assert (tmp_path / "boinc_temporary_exit").read_text().startswith("600\nWaiting to acquire slot")
