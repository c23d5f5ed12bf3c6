"""Accounts of programs: each form of this system against the same expectations, and another system's beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.cgroup import TaskGroup, own_group
from guest_agent.accounting import Account, Accounts, CgroupAccounts, ProcessAccounts, Used, accounts

BURN = "import time\nwhile time.process_time() < {}: pass"
DEADLINE = 30.0


def forms() -> list[str]:
    return ["processes", "cgroup"] if _may_make_groups() else ["processes"]


def _may_make_groups() -> bool:
    home = own_group()
    group = TaskGroup.make(f"vmwrapper-probe-{os.getpid()}", home)
    if group is None:
        return False
    group.remove()
    return True


@pytest.fixture(params=forms())
def form(request: pytest.FixtureRequest) -> Accounts:
    if request.param == "processes":
        return ProcessAccounts()
    home = own_group()
    assert home is not None
    return CgroupAccounts(home, home, ProcessAccounts())


def start(account: Account, *argv: str) -> subprocess.Popen[bytes]:
    with account.starting():
        process = subprocess.Popen(argv, stdout=subprocess.PIPE)
    account.started(process.pid)
    return process


def until_used(account: Account, seconds: float) -> Used:
    until = time.monotonic() + DEADLINE
    while (used := account.used()).cpu_s < seconds:
        assert time.monotonic() < until, used
        time.sleep(0.02)
    return used


def test_a_program_and_its_children_are_counted_while_they_run(form: Accounts) -> None:
    account = form.open(f"c-{os.getpid()}-1")
    burn = f"{sys.executable} -S -c '{BURN.format(60)}'"
    process = start(account, "sh", "-c", f"({burn}) & ({burn}) & wait")
    try:
        seen = until_used(form.find(account.place, process.pid), 0.3)
        assert seen.rss_bytes > 2_000_000
    finally:
        for pid in descendants(process.pid):
            os.kill(pid, 9)
        process.kill()
        process.communicate()
    until = time.monotonic() + DEADLINE  # its orphans end a moment later
    while account.place and Path(account.place).exists() and time.monotonic() < until:
        account.close()
        time.sleep(0.02)
    assert not account.place or not Path(account.place).exists()


def descendants(pid: int) -> list[int]:
    children = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*children, *(each for child in children for each in descendants(child))]


def test_children_that_ended_are_counted(form: Accounts) -> None:
    account = form.open(f"c-{os.getpid()}-2")
    process = start(account, "sh", "-c", f"{sys.executable} -S -c '{BURN.format(0.3)}'; echo; exec sleep 60")
    assert process.stdout is not None
    process.stdout.readline()
    assert until_used(account, 0.25).cpu_s < 10
    process.kill()
    process.communicate()
    account.close()


def test_what_is_not_there_has_used_nothing(form: Accounts) -> None:
    assert form.find("", 2**22 + 1).used() == Used()


@pytest.fixture
def fake_groups(tmp_path: Path) -> Path:
    """A tree that looks like the control groups of a guest whose init has given us a part."""
    home = tmp_path / "vmwrapper" / "agent"
    home.mkdir(parents=True)
    (home / "cgroup.procs").touch()
    return home


@pytest.fixture
def counting_groups(fake_groups: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, with a kernel that counts in each new one."""
    made = os.mkdir

    def mkdir(path: str, mode: int = 0o777) -> None:
        made(path, mode)
        Path(path, "cpu.stat").write_text("usage_usec 3500000\nuser_usec 2500000\nsystem_usec 1000000\n")
        Path(path, "cgroup.procs").touch()

    monkeypatch.setattr(os, "mkdir", mkdir)
    return fake_groups


def test_a_group_counts_what_its_kernel_says(counting_groups: Path) -> None:
    form = CgroupAccounts(counting_groups, counting_groups.parent, ProcessAccounts())
    account = form.open("c-1")
    group = counting_groups.parent / f"task-{os.getpid()}-1"
    with account.starting():
        assert (group / "cgroup.procs").read_text() == "0"  # we are in it
    assert (counting_groups / "cgroup.procs").read_text() == "0"  # and back
    (group / "cgroup.procs").write_text(f"{os.getpid()}\n")
    used = form.find(account.place, 1).used()
    assert form.find(str(group), 1).used() == used, "as a keeper from before says it"
    assert (used.user_s, used.system_s) == (2.5, 1.0)
    assert used.rss_bytes > 1_000_000
    assert account.total() == Used(2.5, 1.0)


def test_a_group_in_which_nothing_runs_is_the_next_programs(
    counting_groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[str] = []
    monkeypatch.setattr(os, "rmdir", removed.append)
    form = CgroupAccounts(counting_groups, counting_groups.parent, ProcessAccounts())
    first = form.open("c-1")
    group = counting_groups.parent / f"task-{os.getpid()}-1"
    (group / "cgroup.procs").write_text("7\n")  # an orphan
    first.close()
    second = form.open("c-2")
    assert second.place.startswith(f"{group.parent}/task-{os.getpid()}-2 "), "it keeps its group"
    group = group.with_name(f"task-{os.getpid()}-2")
    with second.starting():
        pass
    (group / "cgroup.procs").write_text("")
    second.close()
    second.close()  # as the keeper does when the host has the result: it is another's now
    assert str(group) not in removed
    third = form.open("c-3")
    assert third.place.startswith(f"{group} ")
    assert third.total() == form.find(third.place, 1).used() == Used()
    (group / "cpu.stat").write_text("user_usec 2750000\nsystem_usec 1125000\n")
    assert third.total() == form.find(third.place, 1).used() == Used(0.25, 0.125)
    with third.starting():
        assert (group / "cgroup.procs").read_text() == "0"
    (group / "cgroup.procs").write_text("")
    (group / "below").mkdir()  # where more may run
    third.close()
    assert form.open("c-4").place.startswith(f"{group.parent}/task-{os.getpid()}-3 ")


def test_without_a_group_there_is_still_an_account(counting_groups: Path) -> None:
    absent = counting_groups.parent / "absent"
    form = CgroupAccounts(counting_groups, absent, ProcessAccounts())
    assert form.open("c-1").place == ""
    absent.mkdir()
    assert form.open("c-2").place == "", "what may not be done once is not tried for each program"


def test_the_next_group_is_made_when_there_is_time(counting_groups: Path) -> None:
    parent = counting_groups.parent

    def group(number: int) -> Path:
        return parent / f"task-{os.getpid()}-{number}"

    group(1).touch()  # of another keeper, which had this number
    form = CgroupAccounts(counting_groups, parent, ProcessAccounts())
    assert form.open("c-1").place == "", "an account all the same"
    form.prepare()
    form.prepare()
    assert form.open("c-2").place.startswith(f"{group(2)} ")
    form.prepare()
    for file in list(group(3).iterdir()):
        file.unlink()  # a real group's go with it
    form.close()
    assert not group(3).exists()
    assert group(1).exists()


def test_a_group_that_counts_nothing_is_not_used(fake_groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, tried = os.mkdir, []

    def mkdir(path: str) -> None:
        made(path)
        Path(path, "cgroup.procs").touch()
        tried.append(path)

    monkeypatch.setattr(os, "mkdir", mkdir)
    form = CgroupAccounts(fake_groups, fake_groups.parent, ProcessAccounts())
    assert [form.open(command).place for command in ("c-1", "c-2")] == ["", ""]
    assert len(tried) == 1, "what does not count once is not asked again"


def test_this_system_has_a_form() -> None:
    account = accounts().open(f"c-{os.getpid()}-3")
    account.started(os.getpid())
    assert account.used().cpu_s >= 0
    account.close()
