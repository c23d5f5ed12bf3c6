#!/usr/bin/env python3
"""The worker of 2009: `in` to `out` and standard input to standard output in upper case, then N seconds of CPU time."""

import sys
import time
from pathlib import Path


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0
    sys.stderr.write("worker: starting\n")
    Path("out").write_bytes(Path("in").read_bytes().upper())
    sys.stdout.write(sys.stdin.read().upper())
    sys.stdout.flush()
    while time.process_time() < seconds:
        pass
    sys.stderr.write(f"worker: used {seconds:g} s of CPU time\n")


main()
