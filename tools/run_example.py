#!/usr/bin/env python3
"""Run the worker example in a fresh slot, as it is without a BOINC client, and check what comes back.

Exit status: vmwrapper's; 1 when it succeeded but a result is not what it must be.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "worker"
INPUTS = ("in", "stdin_worker")
PROGRAMS = ("worker.py", "summary.py")
MARK = ".example-slot"  # so that we never remove a directory that we did not make


def make_slot(slot: Path) -> None:
    """A new slot directory with everything that the job needs; a previous one is removed."""
    if slot.exists():
        if not (slot / MARK).exists() and any(slot.iterdir()):
            sys.exit(f"{slot} exists and is no slot of this example; remove it or choose another with --slot")
        shutil.rmtree(slot)
    slot.mkdir(parents=True)
    (slot / MARK).touch()
    shutil.copyfile(EXAMPLE / "job.xml", slot / "job.xml")
    for name in PROGRAMS:
        shutil.copyfile(EXAMPLE / name, slot / name)
        (slot / name).chmod(0o755)
    pack(slot / "worker-input.tar")


def pack(path: Path) -> None:
    """The archive of inputs: the same bytes every time."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in INPUTS:
            data = (EXAMPLE / name).read_bytes()
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            archive.addfile(info, io.BytesIO(data))


def run(slot: Path) -> tuple[int, float]:
    """Run vmwrapper; it writes its log to our standard error too. Returns its status and the seconds it took."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-P", "-m", "host_agent.wrapper.main"], cwd=slot, env=environment)
    signal.signal(signal.SIGTERM, lambda number, _frame: process.send_signal(number))
    while True:
        try:
            status = process.wait()
            return status, time.monotonic() - start
        except KeyboardInterrupt:  # the terminal told vmwrapper too; let it clean up
            continue


def show(slot: Path, name: str, lines: int = 8) -> None:
    """The last lines of a result."""
    path = slot / name
    print(f"--- {name}" + ("" if path.exists() else ": not there"))
    if path.exists():
        for line in path.read_text("utf-8", "replace").splitlines()[-lines:]:
            print(f"    {line}")


def check(slot: Path) -> list[str]:
    """What is not as it must be."""
    wrong = []
    for source, result in (("in", "out"), ("stdin_worker", "stdout_worker")):
        wanted = (EXAMPLE / source).read_bytes().upper()
        path = slot / result
        found = path.read_bytes() if path.exists() else None
        if found != wanted:
            wrong.append(f"{result} is not {source} in upper case" if found is not None else f"{result} is not there")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slot", type=Path, default=ROOT / "build" / "example-slot", help="default: %(default)s")
    slot = parser.parse_args().slot.resolve()
    make_slot(slot)
    print(f"slot {slot}", flush=True)
    status, seconds = run(slot)
    for name in ("out", "stdout_worker", "stderr_worker", "stdout_summary"):
        show(slot, name)
    finished = (slot / "boinc_finish_called").exists()  # without it, it was told to quit
    wrong = check(slot) if status == 0 and finished else []
    for sentence in wrong:
        print(f"WRONG: {sentence}")
    if status == 0 and finished and not wrong:
        print(f"out is right, byte for byte ({(slot / 'out').stat().st_size} bytes)")
    print(f"vmwrapper ended with {status} after {seconds:.1f} s")
    return status or bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
