"""The runtime with the client's end of its shared memory in the test's hands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from host_agent.wrapper.boinc import client as client_module
from host_agent.wrapper.boinc import connect, liveness
from host_agent.wrapper.boinc.client import ClientRuntime
from host_agent.wrapper.boinc.runtime import Leave, SporadicApp, SporadicClient, critical_section
from host_agent.wrapper.boinc.shared_memory import LONGEST, MEMORY_FILE, Channel
from host_agent.wrapper.boinc.standalone import StandaloneRuntime
from host_agent.wrapper.boinc.testing import ClientSide

Start = Callable[..., tuple[ClientSide, ClientRuntime]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a runtime in a slot that a client prepared."""
    runtimes: list[ClientRuntime] = []

    def make(**values: float) -> tuple[ClientSide, ClientRuntime]:
        side = ClientSide(tmp_path, **values)  # type: ignore[arg-type]
        runtime = connect(tmp_path)
        assert isinstance(runtime, ClientRuntime)
        runtimes.append(runtime)
        assert not runtime.init().standalone
        return side, runtime

    yield make
    for runtime in runtimes:
        runtime.close()


class Time:
    """A clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        monkeypatch.setattr("time.sleep", self.pass_)

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


def test_without_init_data_there_is_no_client(tmp_path: Path) -> None:
    runtime = connect(tmp_path)
    assert isinstance(runtime, StandaloneRuntime)
    assert runtime.init().standalone


def test_suspend_resume_quit_and_abort(start: Start) -> None:
    side, runtime = start()
    assert not runtime.service()
    assert not runtime.poll().suspended
    side.control("<suspend/>")
    assert runtime.service()
    assert runtime.poll().suspended
    assert runtime.poll().suspended
    side.control("<resume/>")
    assert not runtime.poll().suspended
    side.control("<quit/>")
    assert runtime.poll().leave is Leave.QUIT
    side.control("<abort/>")
    assert runtime.poll().leave is Leave.ABORT
    side.control("<quit/>")
    assert runtime.poll().leave is Leave.ABORT
    assert runtime.poll().quit_reason


def test_a_critical_section_holds_back_suspend_and_quit(start: Start) -> None:
    side, runtime = start()
    with critical_section(runtime), critical_section(runtime):
        side.control("<suspend/>")
        assert not runtime.poll().suspended
        side.control("<quit/>")
        assert runtime.poll().leave is Leave.STAY
    status = runtime.poll()
    assert status.suspended
    assert status.leave is Leave.QUIT


def test_the_newest_report_leaves_when_the_channel_is_free(start: Start) -> None:
    side, runtime = start()
    runtime.report(1.5, 1.0, 0.25)
    runtime.report(2.5, 1.0, 0.5)
    runtime.report(3.5, 2.0, 0.75)
    expected = "<current_cpu_time>{}</current_cpu_time>\n<checkpoint_cpu_time>{}</checkpoint_cpu_time>\n"
    assert (
        side.status()
        == expected.format("1.500000e+00", "1.000000e+00") + "<fraction_done>2.500000e-01</fraction_done>\n"
    )
    assert side.status() is None
    runtime.service()
    assert (
        side.status()
        == expected.format("3.500000e+00", "2.000000e+00") + "<fraction_done>7.500000e-01</fraction_done>\n"
    )
    runtime.service()
    assert side.status() is None


def test_everything_that_a_report_can_say(start: Start) -> None:
    side, runtime = start(fraction_start=0.5)
    runtime.need_network()
    runtime.sporadic(SporadicApp.WANT_COMPUTE)
    runtime.report(1, 1, 7.0, working_set=4096, other_pid=77, bytes_sent=10, bytes_received=20)
    text = side.status() or ""
    for part in (
        "<want_network>1</want_network>",
        "<fraction_done>1.000000e+00</fraction_done>",
        "<other_pid>77</other_pid>",
        "<bytes_sent>10.000000</bytes_sent>",
        "<bytes_received>20.000000</bytes_received>",
        "<wss>4096.000000</wss>",
        "<sporadic_ac>2</sporadic_ac>",
    ):
        assert f"{part}\n" in text
    runtime.network_done()
    runtime.report(1, 1, 0.5)
    text = side.status() or ""
    assert "want_network" not in text
    assert "<fraction_done>7.500000e-01</fraction_done>" in text


def test_the_heart_beat_brings_what_the_client_measured(start: Start) -> None:
    side, runtime = start()
    side.beat("<network_suspended/><sporadic_ca>2</sporadic_ca>")
    status = runtime.poll()
    assert (status.working_set, status.max_working_set) == (1.5e6, 2e9)
    assert status.network_suspended
    assert status.sporadic is SporadicClient.COULD_COMPUTE
    side.beat("<sporadic_ca>99</sporadic_ca>")
    status = runtime.poll()
    assert not status.network_suspended
    assert status.sporadic is SporadicClient.COULD_COMPUTE
    assert runtime.poll() == status


def test_network_wanted_and_there(start: Start) -> None:
    side, runtime = start()
    assert runtime.poll().network_available
    runtime.need_network()
    assert not runtime.poll().network_available
    side.control("<network_available/>")
    assert runtime.poll().network_available


def test_init_data_is_read_again(start: Start) -> None:
    side, runtime = start()
    side.control("<reread_app_info/>")
    assert runtime.poll().reread
    assert runtime.poll().reread
    runtime.init_data()
    assert not runtime.poll().reread
    # Changed preferences come without a message.
    side.write_init_data(checkpoint_period=12345.0)
    assert runtime.poll().reread
    assert runtime.init_data().checkpoint_period_s == 12345.0
    assert not runtime.poll().reread
    (side.slot / "init_data.xml").write_text("<app_init_data><slot>")
    assert runtime.poll().reread
    assert runtime.init_data().checkpoint_period_s == 12345.0


def test_the_time_between_checkpoints(start: Start, clock: Time) -> None:
    _side, runtime = start(checkpoint_period=60.0)
    assert not runtime.time_to_checkpoint()
    clock.now += 61
    assert runtime.time_to_checkpoint()
    assert runtime.time_to_checkpoint()
    runtime.checkpoint_completed()
    assert not runtime.time_to_checkpoint()


def test_a_client_that_is_gone(start: Start) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    side, runtime = start(client_pid=child.pid)
    assert runtime.poll().leave is Leave.STAY
    child.communicate()
    side.control("<suspend/>")
    status = runtime.poll()
    assert status.leave is Leave.NO_CLIENT
    assert side.memory.full(Channel.PROCESS_CONTROL_REQUEST)  # it is for the application of the next client
    side.status()
    runtime.report(1, 1, 1)
    runtime.close()
    assert side.status() is None


def test_a_parent_that_is_gone(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    _side, runtime = start(client_pid=os.getppid())
    assert runtime.poll().leave is Leave.STAY
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert runtime.poll().leave is Leave.NO_CLIENT


def test_thirty_seconds_without_a_heart_beat_of_an_old_client(start: Start, clock: Time) -> None:
    side, runtime = start(client_pid=0)
    clock.now += 3600  # the computer slept: that is no silence of the client's
    assert runtime.poll().leave is Leave.STAY
    for _ in range(26):
        clock.now += 1
        assert runtime.poll().leave is Leave.STAY
    side.beat()
    for _ in range(29):
        clock.now += 1
        assert runtime.poll().leave is Leave.STAY
    for _ in range(3):
        clock.now += 1
        runtime.poll()
    assert runtime.poll().leave is Leave.NO_CLIENT


@pytest.mark.parametrize("error", [PermissionError, OverflowError])
def test_a_process_of_somebody_else_lives(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(_pid: int, _number: int) -> None:
        raise error

    monkeypatch.setattr("os.kill", kill)
    assert liveness.process_exists(4711)


def test_trickles_up_leave_one_after_another(start: Start, clock: Time) -> None:
    side, runtime = start()
    file = side.slot / "trickle_up.xml"
    for number in range(3):
        runtime.send_trickle_up("cpu_time", f"<n>{number}</n>")
    for number in range(3):
        assert file.read_text() == f"<variety>cpu_time</variety>\n<n>{number}</n>"
        assert side.memory.take(Channel.TRICKLE_UP) == "<have_new_trickle_up/>\n"
        runtime.service()
        assert file.read_text().endswith(f"<n>{number}</n>")
        file.unlink()  # the client took it
        runtime.service()
        assert not file.exists()
        clock.now += 1.1
        runtime.service()
    assert not file.exists()
    assert not side.memory.full(Channel.TRICKLE_UP)


def test_a_client_that_takes_no_trickles_costs_no_memory(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    _side, runtime = start()
    for number in range(100):
        runtime.send_trickle_up("v", str(number))
    assert len(runtime._trickles) == client_module.MOST_TRICKLES
    assert runtime._trickles[-1] == ("v", "99")
    assert "dropped" in capsys.readouterr().err


def test_finish_waits_for_trickles_behind_another(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    side, runtime = start()
    taken: list[str] = []
    time = Time(monkeypatch)

    def client(seconds: float) -> None:
        time.now += seconds
        if side.memory.take(Channel.TRICKLE_UP):
            file = side.slot / "trickle_up.xml"
            taken.append(file.read_text())
            file.unlink()

    monkeypatch.setattr("time.sleep", client)
    runtime.send_trickle_up("v", "one")
    runtime.send_trickle_up("v", "two")
    runtime.send_trickle_up("v", "three")
    assert runtime.finish(0) == 0
    client(0)
    assert [text[-5:].strip(">\n") for text in taken] == ["one", "two", "three"]


def test_finish_does_not_wait_for_ever(start: Start, clock: Time) -> None:
    side, runtime = start()
    runtime.send_trickle_up("v", "one")
    runtime.send_trickle_up("v", "two")
    assert runtime.finish(3, "because\nof this", is_notice=True) == 3
    assert clock.now <= 1000 + client_module.FLUSH_S + 1
    assert (side.slot / "boinc_finish_called").read_text() == "3\nbecause of this\nnotice\n"


def test_a_trickle_of_an_earlier_start_is_announced(tmp_path: Path, start: Start) -> None:
    (tmp_path / "trickle_up.xml").write_text("<variety>v</variety>\n")
    side, runtime = start()
    runtime.service()
    assert side.memory.take(Channel.TRICKLE_UP) == "<have_new_trickle_up/>\n"


def test_trickles_down_come_back_until_they_are_done(tmp_path: Path, start: Start) -> None:
    (tmp_path / "trickle_down_1").write_text("earlier")
    side, runtime = start()
    [early] = runtime.trickles_down()
    assert early.text == "earlier"
    runtime.trickle_done(early)
    assert runtime.trickles_down() == []
    (tmp_path / "trickle_down_2").write_text("later")
    assert runtime.trickles_down() == []  # nobody said that there is one, so nobody looked
    side.send(Channel.TRICKLE_DOWN, "<have_trickle_down/>\n")
    assert runtime.service()
    runtime.poll()
    assert [trickle.text for trickle in runtime.trickles_down()] == ["later"]
    assert [trickle.text for trickle in runtime.trickles_down()] == ["later"]


def test_an_intermediate_upload(start: Start) -> None:
    side, runtime = start()
    (side.slot / "boinc_ufs_out").write_text("<status>1</status>")
    runtime.upload_file("out")
    assert (side.slot / "boinc_ufr_out").exists()
    assert side.memory.take(Channel.TRICKLE_UP) == "<have_new_upload_file/>\n"
    assert runtime.upload_status("out") is None
    (side.slot / "boinc_ufs_out").write_text("<status>-185</status>")
    side.send(Channel.TRICKLE_DOWN, "<upload_file_status/>\n")
    assert runtime.service()
    runtime.poll()
    assert not runtime.service()
    assert runtime.upload_status("out") == -185


def test_graphics(start: Start) -> None:
    side, runtime = start()
    runtime.web_graphics_url("http://localhost:80/")
    runtime.remote_desktop("localhost:5900")
    assert side.memory.take(Channel.GRAPHICS_REPLY) == "<web_graphics_url>http://localhost:80/</web_graphics_url>"
    runtime.service()
    expected = "<remote_desktop_addr>localhost:5900</remote_desktop_addr>"
    assert side.memory.take(Channel.GRAPHICS_REPLY) == expected


def test_the_last_report_replaces_one_that_was_not_read(start: Start) -> None:
    side, runtime = start()
    runtime.report(1, 1, 0.1)
    runtime.report(9, 9, 1.0)
    (side.slot / "boinc_temporary_exit").write_text("1\n")
    assert runtime.finish(0) == 0
    assert "<current_cpu_time>9.000000e+00<" in (side.status() or "")
    assert (side.slot / "boinc_finish_called").read_text() == "0\n"


def test_a_temporary_exit(start: Start) -> None:
    side, runtime = start()
    runtime.report(1, 1, 0.1)
    runtime.report(2, 2, 0.2)
    assert runtime.temporary_exit(10**9, "no memory\nat all") == 0
    assert (side.slot / "boinc_temporary_exit").read_text() == "86400\nno memory at all\n"
    assert "<current_cpu_time>2.000000e+00<" in (side.status() or "")


def test_a_start_removes_what_the_last_one_said(tmp_path: Path, start: Start) -> None:
    for name in ("boinc_finish_called", "boinc_temporary_exit"):
        (tmp_path / name).write_text("0\n")
    start()
    assert not (tmp_path / "boinc_finish_called").exists()
    assert not (tmp_path / "boinc_temporary_exit").exists()


@pytest.mark.parametrize("fault", ["missing", "short", "system v", "cut off"])
def test_without_shared_memory_there_is_no_client(fault: str, tmp_path: Path) -> None:
    side = ClientSide(tmp_path, shm_key=1234 if fault == "system v" else -1)
    if fault == "missing":
        (tmp_path / MEMORY_FILE).unlink()
    elif fault == "short":
        (tmp_path / MEMORY_FILE).write_bytes(b"x")
    elif fault == "cut off":
        (tmp_path / "init_data.xml").write_text("<app_init_data>\n<slot>3</slot>")
    said: list[str] = []
    runtime = connect(tmp_path, said.append)
    data = runtime.init()
    assert data.standalone
    assert data.slot == (0 if fault == "cut off" else 3)
    assert "running without a client" in said[0]
    runtime.report(1, 1, 1)
    assert not runtime.service()
    assert runtime.poll().leave is Leave.STAY
    runtime.send_trickle_up("v", "text")
    assert (tmp_path / "trickle_up.xml").exists()
    assert runtime.finish(0) == 0
    runtime.close()
    assert side.slot


def test_a_message_that_does_not_fit_is_refused(start: Start) -> None:
    side, _runtime = start()
    side.send(Channel.TRICKLE_DOWN, "x" * LONGEST)
    assert side.memory.take(Channel.TRICKLE_DOWN) == "x" * LONGEST
    with pytest.raises(ValueError, match="does not fit"):
        side.send(Channel.TRICKLE_DOWN, "x" * (LONGEST + 1))
