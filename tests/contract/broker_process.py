"""The embedded broker in a process of its own, started the way a person starts it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROGRAM = """
import argparse, sys
from host_agent.vmctl import broker
parser = argparse.ArgumentParser()
broker.add_parser(parser.add_subparsers())
arguments = parser.parse_args()
sys.exit(arguments.func(arguments))
"""


class RunningBroker(NamedTuple):
    """Where the broker is, and its process."""

    host: str
    port: int
    login: str
    passcode: str
    process: subprocess.Popen[str]


@contextlib.contextmanager
def running_broker(
    folder: Path, *options: str, login: str = "tester", passcode: str = "a passcode"
) -> Iterator[RunningBroker]:
    """A broker on a free port of the loopback, ended by SIGTERM."""
    passcode_file = folder / "passcode"
    passcode_file.write_text(passcode)
    command = [sys.executable, "-c", PROGRAM, "broker", "--listen", "127.0.0.1:0", "--login", login]
    command += ["--passcode-file", str(passcode_file), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            # Ends when the process does, so a broker that fails to start is not waited for.
            line = process.stdout.readline()
            assert line.startswith("listening on "), line
            port = int(line.split()[2].rpartition(":")[2])
            yield RunningBroker("127.0.0.1", port, login, passcode, process)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
