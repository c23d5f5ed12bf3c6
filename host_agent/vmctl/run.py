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

FOREVER = 10 * 365 * 86400.0
NOT_RUN, NOT_FOUND = 126, 127  # as a shell has them


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "run",
        help="run a command in a VM",
        description="Run a program in a VM: its output comes here while it runs, Ctrl-C interrupts it, "
        "and its exit code is ours (128 + the signal's number if a signal ended it).",
    )
    parser.add_argument("vm", metavar="VM", help="name or instance of the VM (vmctl vms)")
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
    request = {
        "vm": found.vm["vm"],
        "argv": options.command,
        "env": environment,
        "cwd": options.cwd,
        "stdin": options.stdin,
        "deadline_s": options.deadline,
        "stream": True,
    }
    try:
        result = found.client.call("run", request, update, deadline_s=FOREVER)
    except ControlError as error:
        raise ConfigError(f"{options.command[0]} could not be run: {error}", error.hint) from None
    return _exit_code(result)


def _exit_code(result: dict[str, Any]) -> int:
    outcome = result["outcome"]
    if outcome == "exited":
        return int(result["exit_code"])
    if outcome == "signalled":
        number = getattr(signal, f"SIG{result['signal']}", 0)
        print(f"vmctl: ended by signal {result['signal']}", file=sys.stderr)
        return 128 + int(number)
    if outcome == "deadline":
        print("vmctl: killed, its deadline had passed", file=sys.stderr)
        return 124
    print(f"vmctl: {result['reason']}", file=sys.stderr)
    if outcome == "not_started":
        return NOT_FOUND if "No such file" in result["reason"] else NOT_RUN
    return 1
