"""A single call to a worker of its own, without a reactor: for programs that ask VirtualBox once and end."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

from host_agent.programs import module_argv

from .pyvbox import BoxError

ROOT = Path(__file__).resolve().parents[3]  # where the packages are
WORKER = "host_agent.hypervisors.virtualbox.worker"
REMOVE_DEADLINE = 120.0  # seconds for VirtualBox to unregister a machine and delete its disks


def worker_argv() -> list[str]:
    return module_argv(WORKER)


def worker_environment(environment: dict[str, str]) -> dict[str, str]:
    """The environment with this program's packages on the worker's path."""
    path = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    return {**environment, "PYTHONPATH": path}


def one_call(call: str, deadline: float, **arguments: Any) -> Any:
    """The answer; BoxError when there is none within `deadline` seconds, or VirtualBox's failure."""
    request = json.dumps({"id": 1, "call": call, "arguments": arguments}).encode() + b"\n"
    try:
        worker = subprocess.Popen(
            worker_argv(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=worker_environment(dict(os.environ)),
        )
    except OSError as error:
        raise BoxError(f"the process for VirtualBox cannot be started: {error.strerror}") from None
    late = threading.Timer(deadline, worker.kill)
    late.start()
    with worker:
        try:
            assert worker.stdin is not None
            assert worker.stdout is not None
            # The input stays open until the answer is there: its end would end the worker.
            worker.stdin.write(request)
            worker.stdin.flush()
            line = worker.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            late.cancel()
            worker.kill()
    if not line:
        raise BoxError(f"VirtualBox did not answer within {deadline:.0f} s, or its process ended")
    answer = json.loads(line)
    if "error" in answer:
        raise BoxError(answer["error"], answer["hint"])
    return answer["result"]


def remove(machine: str, directory: Path) -> str:
    """Remove what a dead host agent left in VirtualBox; returns "" or why it did not work."""
    try:
        one_call("remove", REMOVE_DEADLINE, machine=machine, directory=str(directory))
    except BoxError as error:
        return str(error)
    return ""
