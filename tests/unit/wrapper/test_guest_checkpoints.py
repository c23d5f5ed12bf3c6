"""When a task in a VM is kept while it runs, what is told to whom, and that a failure of it changes nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from host_agent.wrapper import step
from host_agent.wrapper.boinc.runtime import Status
from host_agent.wrapper.state import StateFile

from .test_guest_task import JOB, Client, build, calls, log, run, slot, start, with_client

__all__ = ["slot"]

SLOW = """#!/bin/sh
echo 0.5 > fraction_done
sleep 1.5
tr a-z A-Z < in > out
"""
KEPT = SLOW.replace("sleep 1.5", 'until [ "$(grep -c checkpoint_vm ../calls)" -ge 3 ]; do sleep 0.05; done')


def job(slot: Path, *, period: str = "0.1", task: str = "", program: str = SLOW) -> None:
    text = JOB.replace("<job_desc>", f"<job_desc><checkpoint_period>{period}</checkpoint_period>")
    (slot / "job.xml").write_text(text.replace("<command_line>", f"{task}<command_line>"))
    (slot / "worker.sh").write_text(program)


def asked(slot: Path, call: str = "checkpoint_vm") -> list[dict[str, object]]:
    return [args for name, args in calls(slot) if name == call]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "TICK_S", 0.05)


def test_a_vm_is_kept_while_its_task_runs(slot: Path) -> None:
    job(slot, program=KEPT)
    assert run(slot) == 0
    made = asked(slot)
    assert len(made) >= 2
    assert made[0] == {"vm": "CernVM", "note": {"task": 1, "cpu_s": 0.0}}


def test_not_before_the_client_wants_it(slot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job(slot)
    client = Client(slot, Status)
    client.time_to_checkpoint = lambda: False  # type: ignore[method-assign]
    assert with_client(build(slot), client, monkeypatch) == 0
    assert asked(slot) == []


@pytest.mark.parametrize(("period", "task"), [("600", ""), ("0.1", "<no_checkpoints/>")])
def test_not_before_the_job_wants_it(slot: Path, period: str, task: str) -> None:
    job(slot, period=period, task=task)
    assert run(slot) == 0
    assert asked(slot) == []


def test_a_checkpoint_that_fails_is_said_once_and_the_job_goes_on(slot: Path) -> None:
    job(slot, program=KEPT)
    assert run(slot, "refuse=checkpoint_vm") == 0
    assert len(asked(slot)) >= 2
    assert log(slot).count("no checkpoint, and it goes on without: No checkpoint_vm today.") == 1


def test_what_is_kept_is_written_down(slot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU time that is kept is counted once, by this wrapper or the next."""
    job(slot, program=KEPT)
    wrapper = build(slot)
    saved: list[int] = []
    client = Client(slot, Status)
    client.checkpoint_completed = lambda: saved.append(wrapper.progress.checkpoint.tasks_done)  # type: ignore[method-assign]
    assert with_client(wrapper, client, monkeypatch) == 0
    assert saved.count(0) >= 2
    assert (slot / "wrapper_checkpoint.txt").read_text().startswith("1 2.000000 ")


def test_a_vm_that_a_later_task_uses_is_kept_at_the_end_of_the_first(slot: Path) -> None:
    job(slot, period="600", program="#!/bin/sh\ncat in > out\n")
    text = (slot / "job.xml").read_text()
    inner = text[text.index("<task>") : text.index("</job_desc>")]
    (slot / "job.xml").write_text(text.replace("</job_desc>", f"{inner}</job_desc>"))
    assert run(slot) == 0
    names = [name for name, _ in calls(slot)]
    assert names.count("checkpoint_vm") == 1
    assert names.index("get") < names.index("checkpoint_vm") < len(names) - names[::-1].index("run")


@pytest.mark.parametrize("call", ["put", "get"])
def test_a_vm_that_went_back_is_looked_at_again(slot: Path, call: str) -> None:
    (slot / "worker.sh").write_text("#!/bin/sh\necho run >> ../runs\ncat in > out\n")
    assert run(slot, f"undone-once={call}") == 0
    assert (slot.parent / "runs").read_text() == "run\n"
    assert (slot / "out").exists()
    assert len(asked(slot, "put")) == (4 if call == "put" else 3)
    assert len({str(args["command"]) for args in asked(slot, "run")}) == 1


AFTER_8 = "begun\nmore\nresumed from 8\n"
RESUMING = """#!/bin/sh
if [ -e saved ]; then echo "resumed from $(cat saved)"; cat in > out; exit 0; fi
echo begun
echo 7 > saved.new
mv saved.new saved
echo later
exec sleep 60
"""


def killed_after_its_checkpoint(slot: Path) -> None:
    """A job whose program has saved 7; all of it is gone when this returns."""
    tag = "<checkpoint_filename>saved</checkpoint_filename>"
    job(slot, period="0", task=tag, program=RESUMING)
    with start(slot) as first:
        until = time.monotonic() + 60
        while not ((record := StateFile(slot).command_of(1)) and record.output_kept):
            assert time.monotonic() < until, log(slot)
            time.sleep(0.05)
        first.kill()


def test_a_program_goes_on_from_its_own_checkpoint_in_a_new_vm(slot: Path) -> None:
    killed_after_its_checkpoint(slot)
    assert asked(slot) == []
    assert (slot / "saved").read_text() == "7\n"
    before = len(calls(slot))
    assert run(slot) == 0
    assert (slot / "o").read_text() in ("begun\nlater\nresumed from 7\n", "begun\nresumed from 7\n")
    assert "going on from its own checkpoint, saved" in log(slot)
    assert [str(args["destination"]) for name, args in calls(slot)[before:] if name == "put"][-1] == "saved"


@pytest.mark.parametrize(
    ("noted", "in_place", "expected"),
    [(False, False, "begun\nresumed from 7\n"), (True, False, AFTER_8), (True, True, AFTER_8)],
)
def test_a_kill_while_a_newer_checkpoint_takes_its_place(
    slot: Path, noted: bool, in_place: bool, expected: str
) -> None:
    """Whichever of the two files counts, what had been printed belongs to it."""
    killed_after_its_checkpoint(slot)
    state = StateFile(slot)
    record = state.command_of(1)
    assert record is not None
    (slot / "o").write_text("begun\nmore\n")
    copied = {"stdout": 11, "stderr": 0} if noted else {}
    kept = {"stdout": 6, "stderr": 0}
    state.keep_command(record._replace(output_kept=kept, output_copied=copied, copied="c1" if noted else ""))
    (slot / ("saved" if in_place else "saved.c1.copied")).write_text("8\n")
    (slot / "saved.c2.copied").write_text("9\n")  # of the wrapper before; its agent has ended only now
    assert run(slot) == 0
    assert (slot / "o").read_text() == expected
    assert not list(slot.glob("saved.c?.copied"))
