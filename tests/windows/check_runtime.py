"""The BOINC runtime on Windows: `python -m tests.windows.check_runtime` with a Python for Windows.

It needs no pytest, so that the smallest Python for Windows will do, also under wine. This process is the client's side
of a slot, another is the application. Each check prints a line; the exit status says whether all held.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from host_agent.wrapper.boinc import liveness
from host_agent.wrapper.boinc.application import Application, run
from host_agent.wrapper.boinc.lock_file import LockFile
from host_agent.wrapper.boinc.runtime import SlotBusyError
from host_agent.wrapper.boinc.shared_memory import Channel
from host_agent.wrapper.boinc.testing import ClientSide

APPLICATION = "application"
DEADLINE_S = 60.0


def application(app: Application) -> int:
    """Steps until a file appears, and says in another when it did."""
    app.runtime.send_trickle_up("v", "<x/>")
    while not Path("go").exists():
        app.step(0.5)
        Path("steps").write_text(f"{time.monotonic()}")
        time.sleep(0.05)
    return 7


def start(slot: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "tests.windows.check_runtime", APPLICATION]
    return subprocess.Popen(words, cwd=slot, stdin=subprocess.DEVNULL)


def until(what: Callable[[], object], meaning: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not what():
        if time.monotonic() > end:
            raise AssertionError(f"never: {meaning}")
        time.sleep(0.05)
    print("ok:", meaning, flush=True)


def steps(slot: Path) -> str:
    try:
        return (slot / "steps").read_text()
    except OSError:  # just being written
        return ""


def main() -> int:
    assert os.name == "nt", "this is for Windows"
    with tempfile.TemporaryDirectory() as name:
        slot = Path(name)
        side = ClientSide(slot, process_priority=0)
        child = start(slot)
        until(lambda: "<fraction_done>5.000000e-01" in (side.status() or ""), "the application reports")
        until(lambda: side.memory.take(Channel.TRICKLE_UP), "a trickle-up is announced")
        try:
            LockFile(slot).acquire(wait_s=0)
            raise AssertionError("the lock is free while the application runs")
        except SlotBusyError:
            print("ok: the slot is locked", flush=True)
        side.control("<suspend/>")
        until(lambda: not side.memory.full(Channel.PROCESS_CONTROL_REQUEST), "the application reads its wishes")
        time.sleep(0.5)
        before = steps(slot)
        time.sleep(1.0)
        assert steps(slot) == before, "it went on while suspended"
        side.control("<resume/>")
        until(lambda: steps(slot) not in ("", before), "the application was suspended and goes on")
        side.control("<quit/>")
        assert child.wait(DEADLINE_S) == 0
        assert not (slot / "boinc_finish_called").exists()
        lock = LockFile(slot)
        lock.acquire(wait_s=0)
        lock.release()
        print("ok: it quit, and the lock is free", flush=True)

    with tempfile.TemporaryDirectory() as name:
        slot = Path(name)
        client = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
        side = ClientSide(slot, client_pid=client.pid)
        child = start(slot)
        until(lambda: steps(slot), "the application runs")
        assert liveness.process_exists(client.pid)
        client.communicate(timeout=DEADLINE_S)
        assert not liveness.process_exists(client.pid)
        assert child.wait(DEADLINE_S) == 0
        print("ok: it ends when its client's process has ended", flush=True)
        (slot / "go").touch()
        side.write_init_data(client_pid=os.getpid())
        assert start(slot).wait(DEADLINE_S) == 7
        assert (slot / "boinc_finish_called").read_text() == "7\n"
        print("ok: it finishes with its status", flush=True)

    with tempfile.TemporaryDirectory() as name:
        slot = Path(name)
        side = ClientSide(slot)
        side.write_init_data(comm_obj_name="of_nobody")
        (slot / "go").touch()
        assert start(slot).wait(DEADLINE_S) == 7
        print("ok: without the client's memory it runs alone", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(application) if sys.argv[1:] == [APPLICATION] else main())
