"""A VM that fails again after the task has begun anew: whether the client is to try later."""

from __future__ import annotations

from pathlib import Path

from .test_groups import Client, calls, in_vm, log, run, write_job
from .test_groups import client as client  # what a test needs
from .test_groups import slot as slot


def test_what_powers_its_vm_off_twice_does_so_always(slot: Path, client: Client) -> None:
    """Not thirty times, over four hours, as for what may be the computer's trouble."""
    write_job(slot, ("", "true", in_vm("CernVM")))
    assert run(slot, "power-off=run") == 208
    assert [call for call, _ in calls(slot)].count("start_vm") == 2
    assert log(slot).count("beginning it anew") == 1
    sentence = "The VM CernVM was powered off by its guest; so was the one before: another attempt would not help"
    assert sentence in log(slot)
    assert not (slot / "boinc_temporary_exit").exists()


def test_another_failure_may_pass(slot: Path, client: Client) -> None:
    write_job(slot, ("", "true", in_vm("CernVM")))
    assert run(slot, "lose-once=run", "refuse=stop_vm") == 0
    assert (slot / "boinc_temporary_exit").exists()
