"""A host agent as a process of its own, as in real life, and a client of its control interface."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import psutil

from benchmarks import profiles
from host_agent.control_client import ControlClient, ControlError, parse_endpoint

VM = "bench"
DEADLINE = 600.0  # seconds for one request
START_DEADLINE = 400.0


@attrs.frozen
class Agent:
    """`folder` is empty at first, but for what the agent itself keeps in it."""

    client: ControlClient
    process: psutil.Process
    folder: Path

    def call(self, call: str, **args: Any) -> dict[str, Any]:
        return self.client.call(call, args, deadline_s=DEADLINE)

    def start_vm(self, name: str = VM, **args: Any) -> None:
        self.call("start_vm", vm=name, directory=str(self.folder / "vms"), deadline_s=START_DEADLINE, **args)

    def run(self, *argv: str, vm: str = VM) -> str:
        """Run a program in the guest to its end; what it printed."""
        file = self.folder / "output"
        file.unlink(missing_ok=True)
        result = self.call("run", vm=vm, argv=list(argv), stdout=str(file))
        if result["exit_code"] != 0:
            raise RuntimeError(f"{argv[0]} failed in the guest: {result}")
        return file.read_text("utf-8")


@contextmanager
def host_agent(
    folder: Path,
    hypervisor: str = "qemu",
    *,
    module: str = "host_agent.main",
    options: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Iterator[Agent]:
    """Start it, and end it with everything that it has; the end of its log where something fails."""
    folder.mkdir(exist_ok=True)
    argv = [*profiles.python(module, module.rpartition(".")[2]), "--hypervisor", hypervisor]
    argv += ["--state", str(folder / "state"), *options]
    environment = {**os.environ, "VMWRAPPER_RUNTIME": str(folder / "run"), **(env or {})}
    log = folder / "agent.log"
    with log.open("wb") as file:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=file, env=environment)
    client: ControlClient | None = None
    try:
        assert process.stdout is not None
        client = ControlClient.connect(parse_endpoint(process.stdout.readline()))
        yield Agent(client, psutil.Process(process.pid), folder)
    except Exception:
        sys.stderr.write(log.read_text("utf-8", "replace")[-3000:])
        raise
    finally:
        if client is not None and client.closed is None:
            with contextlib.suppress(ControlError):  # an interrupt reaches the agent, too
                client.call("shutdown", deadline_s=DEADLINE)
        else:
            process.terminate()  # nobody else tells it
        process.wait(DEADLINE)
