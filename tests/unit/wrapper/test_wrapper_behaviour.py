"""What the wrapper does beside running tasks: as BOINC's does it, or as `docs/compatibility.md` says why not."""

from __future__ import annotations

import errno
import os
import re
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

import psutil
import pytest

from host_agent.wrapper import main, step
from host_agent.wrapper.boinc.runtime import HostInfo, InitData, Leave, SporadicApp, SporadicClient, Status
from host_agent.wrapper.boinc.standalone import StandaloneRuntime
from host_agent.wrapper.main import build_wrapper
from host_agent.wrapper.options import parse_options
from host_agent.wrapper.sporadic import SporadicFiles
from host_agent.wrapper.state import StateFile
from host_agent.wrapper.wrapper import Wrapper


class Client(StandaloneRuntime):
    """A client that a test plays: `wishes` is asked at each look."""

    def __init__(self, slot: Path) -> None:
        super().__init__(slot)
        self.given = InitData(standalone=False, project_dir=str(slot), host=HostInfo(fpops=1e9))
        self.wish: Callable[[], Status] = Status
        self.reports: list[tuple[float, float, float]] = []
        self.trickles: list[str] = []
        self.app_state = SporadicApp.NONE

    def init_data(self) -> InitData:
        return self.given

    def poll(self) -> Status:
        return self.wish()

    def report(self, cpu_s: float, checkpoint_cpu_s: float, fraction: float, **_more: float) -> None:
        self.reports.append((cpu_s, checkpoint_cpu_s, fraction))

    def send_trickle_up(self, variety: str, text: str) -> None:
        self.trickles.append(text)

    def sporadic(self, state: SporadicApp) -> None:
        self.app_state = state


@pytest.fixture
def slot(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def client(slot: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    client = Client(slot)
    monkeypatch.setattr(main, "connect", lambda *_args: client)
    monkeypatch.setattr(step, "TICK_S", 0.05)
    return client


Build = Callable[..., Wrapper]


@pytest.fixture
def build(slot: Path, client: Client) -> Build:
    return lambda *words: build_wrapper(parse_options(words), slot)


def run(build: Build, *words: str) -> int:
    return run_wrapper(build(*words))


def run_wrapper(wrapper: Wrapper) -> int:
    try:
        return int(wrapper.run())
    finally:
        wrapper.runtime.close()
        wrapper.events.close()
        wrapper.log.close()


def task(script: str, more: str = "") -> str:
    return f'<task><application>sh</application><command_line>-c "{escape(script)}"</command_line>{more}</task>\n'


def write_job(slot: Path, *parts: str) -> None:
    (slot / "job.xml").write_text(f"<job_desc>\n{''.join(parts)}</job_desc>\n")


def log(slot: Path) -> str:
    return (slot / "stderr.txt").read_text()


# Archives


def test_inputs_are_unpacked_once(slot: Path, build: Build, client: Client) -> None:
    def archive() -> None:
        with zipfile.ZipFile(slot / "in.zip", "w") as file:
            file.writestr("a.txt", "input")

    archive()
    unzip = "<unzip_input><zipfilename>in.zip</zipfilename></unzip_input>"
    write_job(slot, unzip, task("echo changed > a.txt; touch ready; [ -e again ] || exec sleep 99"))
    client.wish = lambda: Status(leave=Leave.QUIT if (slot / "ready").exists() else Leave.STAY)
    assert run(build) == 0
    archive()  # the client makes the link anew at every start
    (slot / "again").touch()
    client.wish = Status
    assert run(build) == 0
    assert (slot / "a.txt").read_text() == "changed\n"


def test_a_quit_is_heard_while_unpacking(slot: Path, build: Build, client: Client) -> None:
    with zipfile.ZipFile(slot / "in.zip", "w") as file:
        for number in range(3):
            file.writestr(f"{number}.txt", "input")
    write_job(slot, "<unzip_input><zipfilename>in.zip</zipfilename></unzip_input>", task("touch ran"))
    client.wish = lambda: Status(leave=Leave.QUIT if (slot / "0.txt").exists() else Leave.STAY)
    assert run(build) == 0
    assert not (slot / "2.txt").exists()
    assert not (slot / "ran").exists()
    client.wish = Status
    assert run(build) == 0
    assert (slot / "2.txt").exists()


def test_zip_patterns_are_searched_in_names(slot: Path, build: Build) -> None:
    (slot / "old.dat").write_text("was there")
    patterns = "<filename>dat</filename><filename>^res[0-9]+$</filename>"
    zip_output = f"<zip_output><zipfilename>out.zip</zipfilename>{patterns}</zip_output>"
    write_job(slot, zip_output, task("touch x.dat mydata res12 res12b old2; mkdir dat.d"))
    assert run(build) == 0
    with zipfile.ZipFile(slot / "out.zip") as archive:
        assert archive.namelist() == ["mydata", "res12", "x.dat"]


# The client's wishes


def test_no_task_of_a_suspended_job_begins_and_daemons_are_suspended_too(
    slot: Path, build: Build, client: Client
) -> None:
    os.mkfifo(slot / "pid")
    write_job(slot, task("exec sleep 99", "<daemon/>"), task("echo $$ > pid; exec sleep 99"))
    wrapper = build()
    states: list[set[str]] = []

    def wish() -> Status:
        trees = [
            psutil.Process(each._process.pid).children(recursive=True)
            for each in wrapper.services.daemons
            if each._process
        ]
        states.append({each.status() for tree in trees for each in tree})
        if len(states) > 3 and states[-1] == {psutil.STATUS_STOPPED}:
            return Status(leave=Leave.QUIT)
        return Status(suspended=True)

    client.wish = wish
    assert run_wrapper(wrapper) == 0
    assert "suspended by the client" in log(slot)
    assert wrapper.progress.clock.seconds < 5


def test_an_abort_leaves_the_last_words_of_the_task(slot: Path, build: Build, client: Client) -> None:
    write_job(slot, task("echo the reason >&2; touch ready; exec sleep 99", "<stderr_filename>err</stderr_filename>"))
    client.wish = lambda: Status(leave=Leave.ABORT if (slot / "ready").exists() else Leave.STAY)
    assert run(build) == 0
    assert "the end of err:\n    the reason\n" in log(slot)
    assert not (slot / "boinc_finish_called").exists()


@pytest.mark.parametrize(
    ("wish", "no_change", "tag", "nice"),
    [(0, False, "", 19), (0, False, "2", 10), (3, False, "2", 0), (1, True, "", 0)],
)
def test_priority(slot: Path, build: Build, client: Client, wish: int, no_change: bool, tag: str, nice: int) -> None:
    client.given = client.given._replace(process_priority=wish, no_priority_change=no_change)
    write_job(slot, task("nice > n", f"<priority>{tag}</priority>"))
    assert run(build) == 0
    assert int((slot / "n").read_text()) == min(19, nice + os.getpriority(os.PRIO_PROCESS, 0) * (nice == 0))


# What is told


def test_graphics_status(slot: Path, build: Build) -> None:
    name = "graphics_status.xml"
    fractions = "<fraction_done_filename>f</fraction_done_filename>"
    script = f"echo 0.5 > f; until grep -q done.0.5 {name}; do sleep 0.05; done; cp {name} g"
    write_job(slot, "<enable_graphics_support/>", task(script, fractions))
    assert run(build) == 0
    tags = dict(re.findall(r"<(\w+)>([^<]*)</", (slot / "g").read_text()))
    assert set(tags) == {
        *("updated_time", "cpu_time", "elapsed_time", "fraction_done"),
        *("no_heartbeat", "suspended", "quit_request", "abort_request", "network_suspended"),
    }
    assert float(tags["fraction_done"]) == 0.5
    assert abs(float(tags["updated_time"]) - time.time()) < 60
    assert tags["suspended"] == "0"


def test_no_graphics_status_without_the_tag(slot: Path, build: Build) -> None:
    write_job(slot, task("true"))
    assert run(build) == 0
    assert not (slot / "graphics_status.xml").exists()


def test_an_application_checkpoint_is_kept(slot: Path, build: Build, client: Client) -> None:
    burn = f"{sys.executable} -S -c 'import time\nwhile time.process_time() < 0.3: pass'"
    tags = "<checkpoint_filename>state</checkpoint_filename>"
    write_job(slot, task("true"), task(f"{burn}; echo 1 > state; exec sleep 60", tags))
    text = slot / "wrapper_checkpoint.txt"

    def wish() -> Status:
        saved = text.exists() and text.read_text().startswith("1 ") and float(text.read_text().split()[1]) >= 0.3
        return Status(leave=Leave.QUIT if saved else Leave.STAY)

    client.wish = wish
    assert run(build) == 0
    assert client.reports[-1][1] <= client.reports[-1][0]
    cpu_s = float(text.read_text().split()[1])
    write_job(slot, task("true"), task("true"))
    client.wish = Status
    assert run(build) == 0
    assert client.reports[-1][0] >= cpu_s
    assert client.reports[-1][2] == 1


def test_cpu_time_of_daemons_counts(slot: Path, build: Build, client: Client) -> None:
    burn = f"{sys.executable} -S -c 'import time\nwhile time.process_time() < 0.4: pass'; touch burnt; exec sleep 99"
    write_job(slot, task(burn, "<daemon/>"), task("until [ -e burnt ]; do sleep 0.05; done; sleep 0.2"))
    assert run(build) == 0
    assert client.reports[-1][0] >= 0.3


def test_trickles_and_an_early_end(slot: Path, build: Build, client: Client) -> None:
    zip_output = "<zip_output><zipfilename>out.zip</zipfilename><filename>part</filename></zip_output>"
    script = "trap 'echo saved > part2; exit 0' TERM; touch part1 ready; while :; do sleep 0.05; done"
    write_job(slot, zip_output, task(script), task("touch never"))
    ready = slot / "ready"
    down = slot / "trickle_down_1_2"

    def wish() -> Status:
        if ready.exists() and len(client.trickles) >= 2:
            ready.unlink()
            down.write_text("<end_early/>")
        return Status()

    client.wish = wish
    assert run(build, "--trickle", "0.1") == 0
    assert "was ended early, because the project asked for it" in log(slot)
    assert (slot / "boinc_finish_called").read_text().split() == ["0"]
    assert not (slot / "never").exists()
    with zipfile.ZipFile(slot / "out.zip") as archive:
        assert archive.namelist() == ["part1", "part2"]
    numbers = [float(re.findall(r"<run_time_s>(.*?)</", text)[0]) for text in client.trickles]
    assert numbers == sorted(numbers)


def test_sporadic_files(slot: Path, client: Client) -> None:
    files = SporadicFiles(slot, client)
    files.tick(Status())
    assert (slot / "ca").read_text() == "1\n"
    (slot / "ac").write_text("2\n")
    files.tick(Status(sporadic=SporadicClient.COMPUTING))
    assert (slot / "ca").read_text() == "3\n"
    assert client.app_state is SporadicApp.WANT_COMPUTE
    (slot / "ac").write_text("")  # it is writing just now
    files.tick(Status(sporadic=SporadicClient.COULD_COMPUTE))
    assert (slot / "ca").read_text() == "2\n"
    assert client.app_state is SporadicApp.WANT_COMPUTE


def test_a_sporadic_job(slot: Path, build: Build, client: Client) -> None:
    write_job(slot, task("until grep -q 3 ca; do sleep 0.05; done; echo 1 > ac; cp ca got; exec sleep 0.5"))
    client.wish = lambda: Status(sporadic=SporadicClient.COMPUTING)
    assert run(build, "--sporadic") == 0
    assert client.app_state is SporadicApp.DONT_WANT_COMPUTE
    assert not (slot / "never").exists()


# Failures


def test_a_full_disk_is_a_temporary_exit_and_forgotten_with_progress(
    slot: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_job(slot, task("true"), task("true"))

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(slot / "wrapper_checkpoint.txt"))

    with monkeypatch.context() as patch:
        patch.setattr("host_agent.wrapper.progress.write_checkpoint", full)
        delays = []
        for count in (1, 2, 3):
            assert run(build) == 0
            assert not (slot / "boinc_finish_called").exists()
            delay, reason = (slot / "boinc_temporary_exit").read_text().splitlines()[:2]
            delays.append(int(delay))
            assert reason.startswith("the disk is full (")
            assert StateFile(slot).state.temporary_exits == count
    assert 12 <= delays[0] <= 18 < delays[1] < delays[2] < 75
    assert run(build) == 0
    assert (slot / "boinc_finish_called").exists()
    assert not (slot / "boinc_temporary_exit").exists()
    assert StateFile(slot).state.temporary_exits == 0


def test_a_job_that_is_done_is_not_lost_to_a_full_disk(
    slot: Path, build: Build, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_job(slot, task("echo once >> o"))

    def full(*_args: object, **_more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "boinc_finish_called")

    monkeypatch.setattr("host_agent.wrapper.wrapper.delay_s", lambda _count: 1)
    with monkeypatch.context() as patch:
        patch.setattr(client, "finish", full)
        assert run(build) == 0
        assert (slot / "boinc_temporary_exit").read_text().startswith("1\nthe disk is full (boinc_finish_called)\n")
        patch.setattr(client, "temporary_exit", full)
        start = time.monotonic()
        assert run(build) == 0
        assert time.monotonic() - start >= 1
        assert "so the wait is here" in log(slot)
    assert run(build) == 0
    assert (slot / "boinc_finish_called").read_text() == "0\n"
    assert (slot / "o").read_text() == "once\n"


def test_what_does_not_pass_ends_the_job(slot: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    write_job(slot, task("true"))

    def no_memory(*_args: object) -> None:
        raise MemoryError

    monkeypatch.setattr("host_agent.wrapper.progress.write_checkpoint", no_memory)
    StateFile(slot).change(temporary_exits=30)
    assert run(build) == 205
    assert "This computer's memory did not suffice" in log(slot)


def test_a_mistake_of_ours_is_reported_with_its_traceback(
    slot: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_job(slot, task("true"))

    def wrong(*_args: object) -> None:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr("host_agent.wrapper.progress.write_checkpoint", wrong)
    assert run(build) == 204
    assert "Traceback (most recent call last):" in log(slot)
    assert "ZeroDivisionError: of ours" in log(slot)


def test_a_program_that_is_not_signed(slot: Path, build: Build, client: Client) -> None:
    client.given = client.given._replace(app_files=("worker_1",))
    write_job(slot, task("touch never"))
    assert run(build) == 206
    assert "'sh' is not a signed file of the application version" in log(slot)
    assert not (slot / "never").exists()
