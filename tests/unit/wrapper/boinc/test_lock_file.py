"""One application in a slot."""

from __future__ import annotations

import errno
import subprocess
import sys
import time
from pathlib import Path

import pytest

from host_agent.wrapper.boinc import connect, lock_file
from host_agent.wrapper.boinc.lock_file import LockFile
from host_agent.wrapper.boinc.runtime import SlotBusyError

HOLDER = """
import sys
from pathlib import Path
from host_agent.wrapper.boinc.lock_file import LockFile
LockFile(Path(sys.argv[1])).acquire()
print("held", flush=True)
input()
"""


def hold(slot: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(slot)],
        cwd=Path(__file__).parents[4],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_second_application_waits_and_gives_up(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    try:
        started = time.monotonic()
        with pytest.raises(SlotBusyError, match="Another instance"):
            LockFile(tmp_path).acquire(wait_s=1.2)
        assert time.monotonic() - started >= 1.2
    finally:
        holder.kill()
        holder.communicate()


def test_the_lock_of_a_killed_application_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = hold(tmp_path)

    def sleep(_seconds: float) -> None:
        holder.kill()
        holder.wait()

    monkeypatch.setattr(time, "sleep", sleep)
    runtime = connect(tmp_path)
    assert runtime.init().standalone
    runtime.close()
    holder.communicate()


def test_released_it_is_free(tmp_path: Path) -> None:
    lock = LockFile(tmp_path)
    lock.acquire()
    lock.release()
    lock.release()
    holder = hold(tmp_path)
    holder.communicate("\n")
    assert (tmp_path / lock_file.LOCK_FILE).exists()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(_handle: int, _how: int) -> None:
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr("fcntl.lockf", lockf)
    LockFile(tmp_path).acquire(wait_s=0)


def test_no_slot_no_lock(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LockFile(tmp_path / "missing").acquire(wait_s=0)
