"""Who is meant by a process in a file: also when clocks are set, computers started anew, and numbers used again."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import psutil
import pytest

from host_agent import process_identity
from host_agent.process_identity import Identity, identity_of, is_alive


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no better clock")
def test_a_step_of_the_clock_makes_nobody_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil reckons with the time of boot, which the kernel takes from the clock: a step moves every beginning."""
    ours, real = identity_of(os.getpid()), psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: real(self) + 3600)
    assert is_alive(ours)
    assert identity_of(os.getpid()) == ours


def test_the_end_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        identity = identity_of(other.pid)
        assert is_alive(identity)
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert not is_alive(identity), "nobody has waited for it yet"
    assert not is_alive(identity)
    assert not is_alive(identity_of(other.pid))


@pytest.mark.parametrize("change", ["0", "1:"])
def test_another_process_with_the_same_number(change: str) -> None:
    number, began = identity_of(os.getpid())
    boot, _, ticks = str(began).partition(":")
    assert not is_alive([number, f"{boot}:{ticks}{change}" if change == "0" else f"another-boot:{ticks}"])


def test_what_an_agent_of_an_earlier_version_wrote_down() -> None:
    began = psutil.Process().create_time()
    assert is_alive([os.getpid(), began])
    assert not is_alive([os.getpid(), began - 60])


def test_what_cannot_be_told_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ours: Identity = identity_of(os.getpid())

    def no_more_files(pid: int) -> object:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(process_identity, "stat_of", no_more_files)
    assert is_alive(ours)
