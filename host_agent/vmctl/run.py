"""`vmctl run VM -- COMMAND …`: run a program in a VM as if it ran here."""

from __future__ import annotations

import argparse
import base64
import signal
import sys
from typing import Any

from common.errors import ConfigError
from host_agent.control_client import ControlError

from .agents import find_vm
from .run_many import is_pattern, run_many

FOREVER = 10 * 365 * 86400.0
NOT_RUN, NOT_FOUND = 126, 127  # as a shell has them


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "run",
        help="run a command in a VM",
        description="Run a program in a VM: its output comes here while it runs, Ctrl-C interrupts it, "
        "and its exit code is ours (128 + the signal's number if a signal ended it).",
    )
    parser.add_argument(
        "vm",
        metavar="VM",
        help="name or instance of the VM (vmctl vms), or a pattern such as 'worker-*': then it runs in all of them, "
        "each line of output has its VM's name before it, and the exit code is 0 if it was 0 everywhere",
    )
    parser.add_argument("--cwd", default="", help="working directory, relative to the agent's home")
    parser.add_argument("--stdin", default="", help="file of the guest for its standard input (default: nothing)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="may be repeated")
    parser.add_argument("--deadline", type=float, default=0.0, metavar="SECONDS", help="kill it after so long")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="the program and its arguments, after --")
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    environment = {}
    for setting in options.env:
        name, equals, value = setting.partition("=")
        if not name or not equals:
            raise ConfigError(f"--env wants NAME=VALUE, not {setting!r}")
        environment[name] = value
    if is_pattern(options.vm):
        return run_many(options.vm, _request(options, environment), _sentence, FOREVER)
    found = find_vm(options.vm)
    started: list[str] = []

    def update(name: str, data: dict[str, Any]) -> None:
        if name == "started":
            started.append(data["command"])
        elif name == "output":
            out = sys.stdout if data["stream"] == "stdout" else sys.stderr
            out.buffer.write(base64.b64decode(data["data"]))
            out.buffer.flush()

    def interrupt(number: int, frame: Any) -> None:
        if started:
            found.client.start("signal", {"command": started[-1], "signal": "INT"})
        else:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    request = {**_request(options, environment), "vm": found.vm["vm"]}
    try:
        result = found.client.call("run", request, update, deadline_s=FOREVER)
    except ControlError as error:
        raise ConfigError(f"{options.command[0]} could not be run: {error}", error.hint) from None
    return _exit_code(result)


def _request(options: argparse.Namespace, environment: dict[str, str]) -> dict[str, Any]:
    return {
        "argv": options.command,
        "env": environment,
        "cwd": options.cwd,
        "stdin": options.stdin,
        "deadline_s": options.deadline,
        "stream": True,
    }


def _sentence(result: dict[str, Any]) -> str:
    """How it ended, when that was not with exit code 0."""
    outcome = result["outcome"]
    if outcome == "exited":
        return f"ended with exit code {result['exit_code']}"
    if outcome == "signalled":
        return f"ended by signal {result['signal']}"
    return "killed, its deadline had passed" if outcome == "deadline" else str(result["reason"])


def _exit_code(result: dict[str, Any]) -> int:
    outcome = result["outcome"]
    if outcome == "exited":
        return int(result["exit_code"])
    print(f"vmctl: {_sentence(result)}", file=sys.stderr)
    if outcome == "signalled":
        return 128 + int(getattr(signal, f"SIG{result['signal']}", 0))
    if outcome == "deadline":
        return 124
    if outcome == "not_started":
        return NOT_FOUND if "No such file" in result["reason"] else NOT_RUN
    return 1
