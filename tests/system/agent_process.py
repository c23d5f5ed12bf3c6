"""A host agent as a process of its own that can be killed and started again, and its control interface."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import psutil

from host_agent.control_client import ControlClient, parse_endpoint

DEADLINE = 120.0  # seconds for any one call


@attrs.define
class AgentProcess:
    """`vmwrapper-host-agent --state`, with process guests or real VMs. `client` is a connection to the present one."""

    folder: Path
    options: tuple[str, ...] = ()
    hypervisor: str = "process"
    module: str = "host_agent.main"
    process: subprocess.Popen[bytes] | None = None
    client: ControlClient | None = None

    def start(self) -> ControlClient:
        argv = [sys.executable, "-m", self.module, "--hypervisor", self.hypervisor]
        argv += ["--state", str(self.folder / "state"), *self.options]
        env = {**os.environ, "VMWRAPPER_RUNTIME": str(self.folder / "run")}
        with (self.folder / "agent.log").open("ab") as log:
            self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, env=env)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError((self.folder / "agent.log").read_text()[-2000:])
        self.client = ControlClient.connect(parse_endpoint(line))
        return self.client

    def kill(self) -> None:
        """As a crash does."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(DEADLINE)
        if self.client is not None:
            self.client.close()
            self.client = None

    def restart(self) -> ControlClient:
        self.kill()
        return self.start()

    def call(self, call: str, **args: Any) -> dict[str, Any]:
        assert self.client is not None
        return self.client.call(call, args, deadline_s=DEADLINE)

    def pump(self) -> None:
        """Wait for the next words of the agent, and take them."""
        assert self.client is not None
        assert select.select([self.client], [], [], DEADLINE)[0], "the host agent is silent"
        self.client.receive()

    def start_vm(self, name: str) -> Path:
        """Start a process guest; returns its home."""
        self.call("start_vm", vm=name, directory=str(self.folder / "vms"))
        return self.home(name)

    def begin(self, vm: str, command: str, script: str, **args: Any) -> None:
        """Ask for a command and wait until it runs."""
        assert self.client is not None
        started: list[str] = []
        request = {"vm": vm, "command": command, "argv": ["sh", "-c", script], **args}
        self.client.start("run", request, lambda name, data: started.append(name))
        while "started" not in started:
            self.pump()

    def home(self, name: str) -> Path:
        (found,) = (self.folder / "vms").glob(f"vm-{name}-*/home")
        return found

    def end(self) -> None:
        """Ask it to end, with everything that it has."""
        if self.process is None:
            return
        if self.client is not None:
            with contextlib.suppress(Exception):
                self.client.call("shutdown", deadline_s=DEADLINE)
            self.client.close()
        try:
            self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for process in self.left_over():
            process.kill()

    def left_over(self) -> list[psutil.Process]:
        """Processes of its guests, found by their place."""
        place = str(self.folder / "vms")
        found = psutil.process_iter(["cmdline"])
        return [each for each in found if any(place in word for word in each.info["cmdline"] or [])]


@contextlib.contextmanager
def agent_process(folder: Path, *options: str, hypervisor: str = "process") -> Iterator[AgentProcess]:
    agent = AgentProcess(folder, options, hypervisor)
    agent.start()
    try:
        yield agent
    finally:
        agent.end()
