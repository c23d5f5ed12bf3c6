"""A job that is kept while it runs, on the real QEMU: whatever is killed, its results are as if nothing had been."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .checkpointed import ROOT, CheckpointedJob, kill_at_random

pytestmark = pytest.mark.vm

SEED = int(os.environ.get("VMWRAPPER_CHAOS_SEED", "5"))


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(tmp_path / "run"))
    monkeypatch.setenv("VMWRAPPER_IMAGES", os.environ.get("VMWRAPPER_IMAGES", str(ROOT / "build" / "images")))


@pytest.fixture
def job(tmp_path: Path) -> Iterator[CheckpointedJob]:
    job = CheckpointedJob(tmp_path / "slot", count=60, period=2.0)
    job.prepare()
    yield job
    job.end()


def test_each_kind_of_end_in_the_middle_of_a_task(job: CheckpointedJob) -> None:
    """QEMU killed: rolled back. Wrapper killed: the VM went on. Everything killed: rolled back at the next start."""
    job.start()
    for kind in ("qemu", "wrapper", "everything"):
        job.until(lambda: job.lines >= 3)  # so that there is something that a checkpoint can lose
        before = job.checkpoints
        # One that began before there was any output may have been done only now.
        job.until(lambda before=before: job.checkpoints > before and job.kept() > 0)  # type: ignore[misc]
        seen = job.lines
        job.until(lambda seen=seen: job.lines >= seen + 2)  # type: ignore[misc]
        assert job.kill(kind)
        assert job.safe > 0
    job.finish()
    assert job.lowest >= job.safe
    assert job.problems() == []
    assert "its virtual machine failed, and went back to its last checkpoint" in job.log
    assert job.log.count("going on with command c-") == 2


def test_random_kills(job: CheckpointedJob) -> None:
    assert kill_at_random(job, 6, SEED) == []
    assert job.killed


RESUMING = """\
#!/bin/sh
i=$(cat saved 2>/dev/null || echo 0)
while [ $i -lt $1 ]; do
  i=$((i+1))
  echo $i
  echo $i > saved.new
  mv saved.new saved
  sleep 0.25
done
echo done > diary
"""


def has_kept_output(slot: Path) -> bool:
    """Whether the wrapper has written down what belongs to the program's own checkpoint."""
    with contextlib.suppress(OSError, ValueError):
        state = json.loads((slot / "vmwrapper_state.json").read_text().splitlines()[0])
        return any(command["output_kept"] for command in state["commands"])
    return False


def test_a_program_with_a_checkpoint_file_of_its_own(job: CheckpointedJob) -> None:
    """After a power cut it goes on from the file, in a new VM; no VM was ever kept."""
    text = (job.slot / "job.xml").read_text()
    tag = "<checkpoint_filename>saved</checkpoint_filename></task>"
    (job.slot / "job.xml").write_text(text.replace("</task>", tag).replace(">60<", ">30<"))
    (job.slot / "count.sh").write_text(RESUMING)
    job.start()
    job.until(lambda: has_kept_output(job.slot))
    assert job.kill("everything")
    job.finish()
    numbers = [int(line) for line in (job.slot / "stdout").read_text().split()]
    assert sorted(set(numbers)) == list(range(1, 31))
    assert numbers.count(1) == 1
    assert numbers[-1] == 30
    assert (job.slot / "diary").read_text() == "done\n"
    assert "going on from its own checkpoint, saved" in job.log
    assert job.checkpoints == 0
