"""`vmctl run 'worker-*' -- COMMAND …`: the same program in many VMs; answers come as they come."""

from __future__ import annotations

import base64
import selectors
import sys
import time
from collections import deque
from typing import Any

import attrs

from common.errors import ConfigError
from host_agent.control_client import ControlClient, ControlError, endpoints

LONGEST_LINE = 64 * 1024  # bytes that wait for the end of their line


def is_pattern(name: str) -> bool:
    """Whether this names VMs as a shell names files."""
    return any(character in name for character in "*?[")


@attrs.define
class _Lines:
    """Output of many programs, a whole line at a time, with the name of its VM before it."""

    waiting: dict[tuple[str, str], bytes] = attrs.field(factory=dict)

    def take(self, vm: str, stream: str, data: bytes) -> None:
        lines = deque((self.waiting.pop((vm, stream), b"") + data).split(b"\n"))
        rest = lines.pop()
        for line in lines:
            self._print(vm, stream, line)
        if len(rest) > LONGEST_LINE:
            self._print(vm, stream, rest)
        elif rest:
            self.waiting[vm, stream] = rest

    def end(self, vm: str) -> None:
        for stream in ("stdout", "stderr"):
            if rest := self.waiting.pop((vm, stream), b""):
                self._print(vm, stream, rest)

    def _print(self, vm: str, stream: str, line: bytes) -> None:
        out = sys.stdout if stream == "stdout" else sys.stderr
        out.buffer.write(f"{vm}: ".encode() + line + b"\n")
        out.buffer.flush()


def run_many(pattern: str, request: dict[str, Any], describe: Any, deadline_s: float) -> int:
    """Ask every host agent of this user. 0: it ended with 0 everywhere; 1: somewhere it did not."""
    lines = _Lines()
    answers: dict[str, bool] = {}
    matched = 0
    open_: list[ControlClient] = []
    failures: list[ControlError] = []

    def update(name: str, data: dict[str, Any]) -> None:
        if name == "output":
            lines.take(data["vm"], data["stream"], base64.b64decode(data["data"]))
        elif name == "answer":
            lines.end(data["vm"])
            answers[data["vm"]] = data["outcome"] == "exited" and data["exit_code"] == 0
            if not answers[data["vm"]]:
                print(f"{data['vm']}: {describe(data)}", file=sys.stderr, flush=True)

    for endpoint in endpoints():
        try:
            client = ControlClient.connect(endpoint)
        except ControlError as error:
            print(f"vmctl: {error}", file=sys.stderr)
            continue

        def end(result: dict[str, Any] | None, error: ControlError | None, client: ControlClient = client) -> None:
            nonlocal matched
            open_.remove(client)
            matched += result["matched"] if result is not None else 0
            if error is not None:
                failures.append(error)

        open_.append(client)
        client.start("run_many", {**request, "pattern": pattern}, update, end)
    until = time.monotonic() + deadline_s
    with selectors.DefaultSelector() as waiting:
        for client in open_:
            waiting.register(client, selectors.EVENT_READ, client)
        while open_ and time.monotonic() < until:
            for key, _ in waiting.select(60.0):
                key.data.receive()
                if key.data not in open_:
                    waiting.unregister(key.fileobj)
    if failures:
        raise ConfigError(f"not every VM was reached: {failures[0]}", failures[0].hint)
    if not matched:
        raise ConfigError(f"no VM has a name like {pattern}", "vmctl vms lists them")
    good = sum(answers.values())
    print(f"vmctl: {good} of {matched} VMs ended it with 0", file=sys.stderr)
    return 0 if good == matched else 1
