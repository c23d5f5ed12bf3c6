"""A job that is kept while it runs, on the real QEMU: whatever is killed, its results are as if nothing had been."""

from __future__ import annotations

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
    job = CheckpointedJob(tmp_path / "slot", count=60)
    job.prepare()
    yield job
    job.end()


def test_each_kind_of_end_in_the_middle_of_a_task(job: CheckpointedJob) -> None:
    """QEMU killed: rolled back. Wrapper killed: the VM went on. Everything killed: rolled back at the next start."""
    job.start()
    for kind in ("qemu", "wrapper", "everything"):
        before = job.checkpoints
        job.until(lambda before=before: job.checkpoints > before)  # type: ignore[misc]
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
