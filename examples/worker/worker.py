#!/usr/bin/env python3
"""The worker of BOINC's examples: file `in` to `out` and stdin to stdout in upper case, and N seconds of CPU time."""

import sys
import time
from pathlib import Path


def report(fraction: float) -> None:
    """Say how much is done; the file is replaced at once, so that nobody reads half a number."""
    new = Path("fraction_done.new")
    new.write_text(f"{fraction:.3f}\n")
    new.replace("fraction_done")


def burn(seconds: float) -> None:
    """Use so much CPU time, with a line of progress for every second of it."""
    start = time.process_time()
    shown = 0
    while True:
        used = time.process_time() - start
        report(min(1.0, used / seconds) if seconds else 1.0)
        if int(used) > shown:
            shown = int(used)
            print(f"worker: {shown} s of {seconds:g} s CPU time used", file=sys.stderr, flush=True)
        if used >= seconds:
            return
        until = time.process_time() + min(0.1, seconds - used)
        while time.process_time() < until:
            pass


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0
    print(f"worker: starting in {Path.cwd()}, Python {sys.version.split()[0]}", file=sys.stderr, flush=True)
    new = Path("out.new")
    with Path("in").open("rb") as source, new.open("wb") as target:
        for block in iter(lambda: source.read(1 << 20), b""):
            target.write(block.upper())
    new.replace("out")
    for block in iter(lambda: sys.stdin.buffer.read(1 << 16), b""):
        sys.stdout.buffer.write(block.upper())
    sys.stdout.buffer.flush()
    burn(seconds)
    print("worker: done", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
