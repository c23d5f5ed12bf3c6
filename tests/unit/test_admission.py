"""Who may start a VM, and when: several host agents on one host, some of which die."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from host_agent import admission
from host_agent.admission import Admission, Host, NoRoom, Ticket

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 30.0


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))
    return tmp_path / "run" / "admission"


class Memory:
    """What a host has free."""

    def __init__(self, free_mb: int) -> None:
        self.free_mb = free_mb

    def __call__(self) -> int:
        return self.free_mb


def enter(agent: Admission, name: str, memory_mb: int = 0, cpus: int = 1) -> tuple[Deferred[Ticket], list[str]]:
    told: list[str] = []
    return Deferred.fromCoroutine(agent.enter(name, memory_mb, cpus, told.append)), told


def failure_of(waiting: Deferred[Ticket]) -> NoRoom | None:
    """Why there is no ticket."""
    found: list[NoRoom] = []

    def failed(failure: Failure) -> None:
        assert isinstance(failure.value, NoRoom)
        found.append(failure.value)

    waiting.addErrback(failed)
    return found[0] if found else None


def ticket_of(entered: Deferred[Ticket]) -> Ticket:
    result = entered.result
    assert isinstance(result, Ticket)
    return result


def test_only_so_many_start_at_once_on_a_host() -> None:
    clock = Clock()
    one, other = (Admission(clock, Host(cores=4, available_mb=Memory(9999))) for _ in range(2))
    in_time = [enter(agent, f"i-{number}")[0] for number, agent in enumerate((one, other, one))]
    assert all(each.called for each in in_time)
    late, told = enter(other, "i-late")
    assert not late.called
    assert told == ["other VMs are starting"]
    clock.advance(admission.LOOK_AGAIN)
    assert not late.called
    ticket_of(in_time[0]).started()
    clock.advance(admission.LOOK_AGAIN)
    assert late.called
    for each in (*in_time, late):
        ticket_of(each).close()


def test_memory_that_was_promised_counts_before_it_is_used() -> None:
    clock, memory = Clock(), Memory(1000)
    agent = Admission(clock, Host(cores=8, available_mb=memory))
    first, _ = enter(agent, "i-1", memory_mb=500)
    assert first.called
    second, told = enter(agent, "i-2", memory_mb=500)
    assert not second.called
    assert told == ["this computer has 500 MB of memory free, and a VM needs 756 MB"]
    ticket_of(first).close()
    clock.advance(admission.LOOK_AGAIN)
    assert second.called
    ticket_of(second).close()


def test_waiting_has_an_end() -> None:
    clock = Clock()
    agent = Admission(clock, Host(cores=8, available_mb=Memory(100)))
    waiting, _ = enter(agent, "i-1", memory_mb=500)
    for _ in range(int(admission.PATIENCE / admission.LOOK_AGAIN) + 1):
        clock.advance(admission.LOOK_AGAIN)
    assert str(failure_of(waiting)) == "this computer has 100 MB of memory free, and a VM needs 756 MB, for 300 s"


def test_who_is_stopped_waits_no_more() -> None:
    clock = Clock()
    agent = Admission(clock, Host(cores=8, available_mb=Memory(100)))
    wanted = [True]
    waiting = Deferred.fromCoroutine(agent.enter("i-1", 500, 1, lambda why: None, lambda: wanted[0]))
    clock.advance(admission.LOOK_AGAIN)
    wanted[0] = False
    clock.advance(admission.LOOK_AGAIN)
    assert failure_of(waiting) is not None


@pytest_twisted.ensureDeferred
async def test_processors() -> None:
    agent = Admission(reactor, Host(cores=2, available_mb=Memory(9999)))
    with pytest.raises(NoRoom, match="a VM with 5 processors does not fit: this computer has 2"):
        await agent.enter("i-1", 0, 5, lambda why: None)
    ticket = await agent.enter("i-2", 0, 4, lambda why: None)
    _waiting, why = agent._try("i-3", 0, 1)
    assert why == "the VMs on this computer have 4 processors already"
    ticket.close()
    agent.again("i-4", 0, 4)  # of an earlier agent: it is there, and counts
    assert agent._try("i-5", 0, 1)[0] is None


HOLDER = """
from host_agent.admission import Admission, Host
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.internet.defer import Deferred
agent = Admission(Clock(), Host(8, lambda: 1000))
for number in range(4):
    Deferred.fromCoroutine(agent.enter(f"i-held-{number}", 150, 1, print))
print("holds", flush=True)
input()
"""


@pytest_twisted.ensureDeferred
async def test_who_dies_holds_nothing_any_more(place: Path) -> None:
    """kill -9 of an agent with four VMs that are starting: their turns and their memory are free again."""
    agent = Admission(reactor, Host(cores=8, available_mb=Memory(1000)))
    command = [sys.executable, "-c", HOLDER]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"holds\n"
        assert len(list(place.glob("i-held-*"))) == 4
        waiting, told = enter(agent, "i-1", memory_mb=500)
        assert not waiting.called and told
        holder.kill()
    ticket = await waiting.addTimeout(DEADLINE, reactor)
    ticket.close()
    assert list(place.glob("i-*")) == []
