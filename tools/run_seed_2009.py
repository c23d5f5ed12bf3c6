#!/usr/bin/env python3
"""Run the worker example of 2009 as its slides print it, in a fresh slot, and check what comes back, byte for byte.

Exit status: vmwrapper's; 1 when it succeeded but a result is not what it must be.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from run_example import MARK, ROOT, run, show

EXAMPLE = ROOT / "examples" / "seed-2009"
FILES = ("job.xml", "worker.py", "in", "stdin_worker")
STDERR = b"worker: starting\nworker: used 5 s of CPU time\n"


def make_slot(slot: Path, port: int) -> None:
    """A new slot with the job's files and the three archives; a previous one of ours is removed."""
    if slot.exists():
        if not (slot / MARK).exists() and any(slot.iterdir()):
            sys.exit(f"{slot} exists and is no slot of this example; remove it or choose another with --slot")
        shutil.rmtree(slot)
    slot.mkdir(parents=True)
    (slot / MARK).touch()
    for name in FILES:
        shutil.copy2(EXAMPLE / name, slot / name)
    (slot / "worker.py").chmod(0o755)
    subprocess.run([sys.executable, str(EXAMPLE / "make_archives.py"), str(slot), "--port", str(port)], check=True)


def check(slot: Path) -> list[str]:
    """What is not as it must be."""
    wanted = {
        "out": (EXAMPLE / "in").read_bytes().upper(),
        "stdout_worker": (EXAMPLE / "stdin_worker").read_bytes().upper(),
        "stderr_worker": STDERR,
    }
    wrong = []
    for name, data in wanted.items():
        path = slot / name
        found = path.read_bytes() if path.exists() else None
        if found != data:
            wrong.append(f"{name} is {found!r}, not {data!r}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slot", type=Path, default=ROOT / "build" / "seed-2009-slot", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=61613, help="the broker's (default: %(default)s, that of 2009)")
    step = parser.add_mutually_exclusive_group()
    step.add_argument("--only-make", action="store_true", help="make the slot, and run nothing")
    step.add_argument("--only-run", action="store_true", help="run what is in the slot")
    options = parser.parse_args()
    slot = options.slot.resolve()
    if not options.only_run:
        make_slot(slot, options.port)
    print(f"slot {slot}", flush=True)
    if options.only_make:
        return 0
    status, seconds = run(slot)
    for name in ("stderr_broker", "stderr_HostMain") if status else ("out", "stdout_worker", "stderr_worker"):
        show(slot, name)
    wrong = check(slot) if status == 0 else []
    for sentence in wrong:
        print(f"WRONG: {sentence}")
    if status == 0 and not wrong:
        print("out, stdout and stderr of the worker are right, byte for byte")
    print(f"vmwrapper ended with {status} after {seconds:.1f} s")
    return status or bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
