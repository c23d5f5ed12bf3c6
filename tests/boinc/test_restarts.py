"""The client is snoozed, restarted and killed, and so is the wrapper, in the middle of a job."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from .conftest import Site, job, task
from .processes import TASK, WRAPPER, processes
from .project import Report, Work

UPLOADED = 5


def send(site: Site, name: str, *tasks: str) -> Work:
    """Send a job and start the client; its `log` becomes the output."""
    last = task("cp log boinc_resolve(out)")
    work = site.project.send(Work(name, 100, {"job.xml": job(*tasks, last)}, ("out",)))
    site.start()
    site.client.attach(site.project.url)
    return work


def wrappers(site: Site, slot: Path) -> list[psutil.Process]:
    """The wrapper itself, which the client started; not its children."""
    return [each for each in processes(slot, WRAPPER) if each.info["ppid"] == site.client.pid]


def log_lines(slot: Path) -> list[str]:
    try:
        return (slot / "log").read_text().splitlines()
    except FileNotFoundError:
        return []


def ran_only_what_was_not_done(report: Report) -> None:
    """No task runs again after the next one began: by then its end was on the disk."""
    numbers = [int(number) for number in re.findall(r"running task (\d+) ", report.stderr)]
    assert numbers == sorted(numbers), report.stderr


def test_snooze_restart_and_kill_in_mid_task(site: Site, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    work = send(
        site,
        "interrupted",
        task("echo first >> log; sleep 2"),
        task(f"echo second begins >> log; while [ ! -e {gate} ]; do sleep 0.1; done; echo second ends >> log"),
    )
    slot = site.slot(work, "log")
    begins = 1

    def begun() -> bool:
        return log_lines(slot) == ["first"] + ["second begins"] * begins

    def interrupt(how: str, action: Callable[[], None]) -> None:
        nonlocal begins
        site.client.wait(begun, f"the second task runs before {how}")
        old = processes(slot, TASK)
        action()
        begins += 1
        site.client.wait(begun, f"the second task runs again after {how}")
        site.client.wait(lambda: not [each for each in old if each.is_running()], f"nothing is left after {how}")
        assert len(wrappers(site, slot)) == 1

    def snooze() -> None:
        site.client.command("--set_run_mode", "never", "600")
        site.wait_for_state(work, "UNINITIALIZED")  # told to quit: what is suspended does not stay in memory
        site.client.wait(lambda: not processes(slot, TASK) + processes(slot, WRAPPER), "it has quit")
        site.client.command("--set_run_mode", "auto", "0")

    def restart() -> None:
        site.client.quit()
        assert not processes(slot, TASK) + processes(slot, WRAPPER)
        site.start()

    def crash() -> None:
        site.client.kill()
        site.start()

    def kill_wrapper() -> None:
        for each in wrappers(site, slot):
            each.kill()

    # Until the first checkpoint the client leaves a task in memory, whatever the volunteer says.
    site.client.wait(lambda: "interrupted_0 checkpointed" in site.client.log(), "a checkpoint")
    interrupt("snooze", snooze)
    interrupt("a restart of the client", restart)
    interrupt("kill -9 of the client", crash)
    interrupt("kill -9 of the wrapper", kill_wrapper)
    site.client.wait(begun, "the second task runs")
    gate.touch()
    report = site.report(work)
    assert (report.exit_status, report.state) == (0, UPLOADED)
    expected = ["first"] + ["second begins"] * begins + ["second ends"]
    assert site.project.uploads[work.output("out")].decode().splitlines() == expected
    ran_only_what_was_not_done(report)


def test_random_restarts_and_kills(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`VMWRAPPER_CHAOS` says how many; `make chaos-boinc` asks for fifty."""
    count = int(os.environ.get("VMWRAPPER_CHAOS", "8"))
    seed = int(os.environ.get("VMWRAPPER_CHAOS_SEED", time.time_ns() % 10**6))
    with capsys.disabled():
        print(f" chaos: {count} interruptions, VMWRAPPER_CHAOS_SEED={seed} ", end="", flush=True)
    source = random.Random(seed)
    gate = tmp_path / "gate"
    tasks = [task(f"echo begin {number} >> log; sleep 0.7; echo end {number} >> log") for number in range(count)]
    tasks.append(task(f"while [ ! -e {gate} ]; do sleep 0.1; done; echo end {count} >> log"))
    work = send(site, "chaos", *tasks)
    slot = site.slot(work, "log")

    def kill_wrapper() -> None:
        for each in wrappers(site, slot):
            each.kill()

    def quit_client() -> None:
        site.client.quit()
        site.start()

    def kill_client() -> None:
        site.client.kill()
        site.start()

    for _ in range(count):
        site.client.wait(lambda: wrappers(site, slot), "the job runs")
        time.sleep(source.uniform(0.0, 2.5))  # at any moment of a task, also between two
        source.choice((kill_wrapper, quit_client, kill_client))()
    gate.touch()
    report = site.report(work, deadline_s=120.0)
    assert (report.exit_status, report.state) == (0, UPLOADED)
    ends = [line for line in site.project.uploads[work.output("out")].decode().splitlines() if line.startswith("end")]
    assert list(dict.fromkeys(ends)) == [f"end {number}" for number in range(count + 1)]
    ran_only_what_was_not_done(report)
