"""`python -m tests.vm.chaos_checkpoint`: random kills of everything that one checkpointed job in a VM is made of."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from .checkpointed import ROOT, CheckpointedJob, kill_at_random

# Of the job's output; it prints on until every kill has had its turn, eleven lines on idle machines.
LINES_FOR_A_KILL = 14


def main() -> int:
    """0: the results are those of an undisturbed run, nothing kept was lost or left over; 1: not so, and the seed."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm.chaos_checkpoint", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32))
    parser.add_argument(
        "--lines", type=int, default=LINES_FOR_A_KILL, help="of output for each kill; busy machines need fewer"
    )
    parser.add_argument("--folder", type=Path, help="work there, and keep what is in it (default: a temporary one)")
    options = parser.parse_args()
    os.environ.setdefault("VMWRAPPER_IMAGES", str(ROOT / "build" / "images"))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vmw-chaos-") as temporary:
        folder = Path(temporary) if options.folder is None else options.folder
        os.environ["VMWRAPPER_RUNTIME"] = str(folder / "run")
        job = CheckpointedJob(folder / "slot", count=options.lines * options.kills)
        job.prepare()
        try:
            problems = kill_at_random(job, options.kills, options.seed, lambda text: print(text, flush=True))
        finally:
            job.end()
    for problem in problems:
        print(problem)
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(Counter(job.killed).items()))
    verdict = "FAILED" if problems else "results as if nothing had happened, nothing kept was lost, nothing left over"
    seconds = time.monotonic() - began
    print(f"{len(job.killed)} kills ({kinds}) in {seconds:.0f} s, seed {options.seed}: {verdict}", flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
