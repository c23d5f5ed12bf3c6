"""The same script through BOINC's own library and through our runtime: what does the client's side see?

Debian's `libboinc-app7` is the oracle. Differences that are meant stand at the end of this file.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from host_agent.wrapper.boinc.lock_file import LockFile
from host_agent.wrapper.boinc.runtime import SlotBusyError
from host_agent.wrapper.boinc.shared_memory import Channel
from host_agent.wrapper.boinc.testing import ClientSide

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("official", "ours")


class Session:
    """One application in a slot, and the client's side of it in our hands."""

    def __init__(self, side: str, slot: Path, client_pid: int | None = None) -> None:
        slot.mkdir()
        self.slot = slot
        self.client = ClientSide(slot, client_pid=client_pid, wu_cpu_time=100.0)
        self.seen: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.boinc.drivers", side],
            cwd=slot,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.tell("init") == "standalone=0"

    def tell(self, command: str) -> str:
        """Tell the application something; its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().rstrip("\n")
        self.seen.append(f"{command} -> {answer}")
        return answer

    def wait_for(self, what: Callable[[], object], deadline_s: float = 30.0) -> None:
        until = time.monotonic() + deadline_s
        while not what():
            assert time.monotonic() < until, self.seen
            time.sleep(0.02)

    def asked(self, command: str, answer: str, deadline_s: float = 30.0) -> None:
        """Ask until the answer has a part; it is then what counts."""

        def has_it() -> bool:
            del self.seen[count:]
            return answer in self.tell(command)

        count = len(self.seen)
        self.wait_for(has_it, deadline_s)

    def message(self, channel: Channel) -> None:
        """The next message of the application on a channel."""
        self.wait_for(lambda: self.client.memory.full(channel))
        self.seen.append(f"{channel.name}: {self.client.memory.take(channel)}")

    def file(self, name: str) -> None:
        self.wait_for((self.slot / name).exists)
        self.seen.append(f"{name}: {(self.slot / name).read_text()}")

    def ended(self) -> None:
        self.seen.append(f"exit {self.process.wait(30)}")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def sessions(tmp_path: Path) -> Iterator[list[Session]]:
    made = [Session(side, tmp_path / side) for side in SIDES]
    yield made
    for session in made:
        session.close()


def compare(sessions: list[Session]) -> None:
    official, ours = sessions
    assert ours.seen == official.seen
    names = [sorted(path.name for path in session.slot.iterdir()) for session in sessions]
    for name in ("boinc_lockfile", "stderr.txt"):  # see the end of this file
        for each in names:
            if name in each:
                each.remove(name)
    assert names[0] == names[1]


def test_reports_and_wishes(sessions: list[Session]) -> None:
    for session in sessions:
        client = session.client
        with pytest.raises(SlotBusyError):
            LockFile(session.slot).acquire(wait_s=0)
        session.tell("report 12.5 10.25 0.5 0 0 0")
        session.message(Channel.APP_STATUS)
        session.tell("report 1234567.891 10.25 0.123456789 4711 1e10 2.5")
        session.message(Channel.APP_STATUS)
        session.tell("report 1e-7 0 0 0 0 0")
        session.tell("report 99 99 1 0 0 0")
        session.message(Channel.APP_STATUS)
        client.memory.take(Channel.APP_STATUS)
        for wish, answer in (
            ("<suspend/>", "suspended=1"),
            ("<resume/>", "suspended=0"),
            ("<suspend/>\n", "suspended=1"),
            ("<reread_app_info/>", "reread=1"),
        ):
            client.control(wish)
            session.asked("status", answer)
        client.beat()
        session.asked("status", "wss=1.5e+06")
        client.control("<quit/>")
        session.asked("status", "quit=1")
    compare(sessions)


def test_abort(sessions: list[Session]) -> None:
    for session in sessions:
        session.client.control("<abort/>")
        session.asked("status", "abort=1")
    compare(sessions)


def test_trickles_uploads_and_graphics(sessions: list[Session]) -> None:
    name = "a_name_that_needs_memory_of_its_own"
    for session in sessions:
        client, slot = session.client, session.slot
        session.tell("trickle cpu_time <cpu_time>1.5</cpu_time>")
        session.message(Channel.TRICKLE_UP)
        session.file("trickle_up.xml")
        (slot / "trickle_up.xml").unlink()
        assert session.tell("receive") == ""
        (slot / "trickle_down_1").write_text("hello")
        client.send(Channel.TRICKLE_DOWN, "<have_trickle_down/>\n")
        session.asked("receive", "trickle_down_1")
        (slot / "trickle_down_1").unlink()
        session.tell("receive")
        (slot / name).write_text("result")
        session.tell(f"upload {name}")
        session.message(Channel.TRICKLE_UP)
        session.file(f"boinc_ufr_{name}")
        session.tell(f"uploaded {name}")
        (slot / f"boinc_ufs_{name}").write_text("<status>0</status>\n")
        client.send(Channel.TRICKLE_DOWN, "<upload_file_status/>\n")
        session.asked(f"uploaded {name}", "0")
        session.tell("url http://localhost:8080/")
        session.message(Channel.GRAPHICS_REPLY)
        session.tell("desktop localhost:5900")
        session.message(Channel.GRAPHICS_REPLY)
    compare(sessions)


def test_soft_links(sessions: list[Session]) -> None:
    for session in sessions:
        (session.slot / "in").write_text("<soft_link>../../projects/example.org/in_1</soft_link>\n")
        (session.slot / "plain").write_text("no link")
        (session.slot / "link").symlink_to("../../projects/example.org/in_2")
        for name in ("in", "plain", "link", "missing"):
            session.tell(f"resolve {name}")
    compare(sessions)


@pytest.mark.parametrize("command", ["finish 0", "finish 195 it did not work", "temporary 60 no network"])
def test_ends(command: str, sessions: list[Session]) -> None:
    for session in sessions:
        session.tell("report 5 4 1 0 0 0")
        session.client.memory.take(Channel.APP_STATUS)
        session.tell(command)
        session.ended()
        session.file("boinc_temporary_exit" if "temporary" in command else "boinc_finish_called")
        LockFile(session.slot).acquire(wait_s=0)
    compare(sessions)


def test_a_client_that_is_gone(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    sessions = [Session(side, tmp_path / side, parent.pid) for side in SIDES]
    for session in sessions:
        assert "no_heartbeat=0" in session.tell("status")
    parent.communicate()
    for session in sessions:
        session.asked("status", "no_heartbeat=1")  # the library looks every ten seconds
        session.close()
    compare(sessions)


def test_the_library_sees_our_lock(tmp_path: Path) -> None:
    ours = Session("ours", tmp_path / "slot")
    official = subprocess.Popen(
        [sys.executable, "-m", "tests.boinc.drivers", "official"],
        cwd=ours.slot,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        stdin=subprocess.PIPE,
    )
    assert official.stdin is not None
    official.stdin.write(b"init\n")
    official.stdin.flush()
    log = ours.slot / "stderr.txt"
    ours.wait_for(lambda: log.exists() and "Can't acquire lockfile" in log.read_text())
    official.kill()
    official.communicate()
    ours.close()


# What differs, and is meant to:
# - The library removes the lock file at the end, we leave it (a later owner of the slot may have locked it already).
# - The library redirects standard error to stderr.txt; ours is where the client opened it.
# - It looks for the client's process every ten seconds, we look every time.
