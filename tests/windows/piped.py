"""Runs a program with pipes for its standard streams, which wine needs, and ends with it: `piped.py ARGV…`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys


def main() -> int:
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def end(*_: object) -> None:
        process.kill()
        os._exit(143)  # its pipe may be held open by wine's own processes

    signal.signal(signal.SIGTERM, end)
    assert process.stdout is not None
    while data := os.read(process.stdout.fileno(), 4096):
        sys.stderr.buffer.write(data)
        sys.stderr.buffer.flush()
    return process.wait()


if __name__ == "__main__":
    sys.exit(main())
