"""`vmctl start VM`: a VM for as long as this command runs."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common.errors import VMwrapperError
from host_agent.control_client import ControlClient, ControlError
from host_agent.wrapper.agent_process import OwnedAgent, agent_argv
from host_agent.wrapper.events import Events

TICK = 1.0  # seconds between looks at the host agent; a signal and its end wake us at once


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "start",
        help="start a VM, until Ctrl-C",
        description="Start a VM with a host agent of its own, and keep both until Ctrl-C. In another terminal, "
        "vmctl run and vmctl copy use it meanwhile. Nothing of it is left afterwards.",
    )
    parser.add_argument("vm", metavar="VM", help="a name for it")
    parser.add_argument("--image", default="", help="name or directory of an image (vmctl image list)")
    parser.add_argument("--memory", type=int, default=0, metavar="MB", help="default: what the image asks for")
    parser.add_argument("--cpus", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--deadline", type=float, default=0.0, metavar="SECONDS", help="for its agent to answer")
    parser.add_argument(
        "--broker", type=Path, metavar="FILE", help="settings of an external message broker (vmctl broker init)"
    )
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    events = Events()
    with tempfile.TemporaryDirectory(prefix="vmwrapper-") as directory:
        argv = agent_argv()
        if options.broker is not None:
            argv += ["--broker", str(options.broker.absolute())]
        agent = OwnedAgent(Path(directory), events, say=_say, argv=argv)
        try:
            agent.start()
            return _serve(options, directory, agent, events)
        finally:
            agent.stop()
            events.close()


def _serve(options: argparse.Namespace, directory: str, agent: OwnedAgent, events: Events) -> int:
    began = time.monotonic()
    client: ControlClient | None = None
    while client is None and not events.quit_signal:
        client = agent.client()
        if client is None:
            events.wait(TICK)
    if client is None:
        return 0
    request = {
        "vm": options.vm,
        "image": options.image,
        "memory_mb": options.memory,
        "cpus": options.cpus,
        "directory": directory,
        "deadline_s": options.deadline,
    }

    def update(name: str, data: dict[str, Any]) -> None:
        _say(f"{time.monotonic() - began:5.1f} s  {data['state']} {data['reason']}")

    failures: list[ControlError] = []

    def ready(vm: dict[str, Any] | None, error: ControlError | None) -> None:
        if vm is not None:
            print(f"{options.vm} is ready ({vm['image']}, {vm['memory_mb']} MB); Ctrl-C ends it", flush=True)
        elif error is not None:
            failures.append(error)

    client.start("start_vm", request, update, ready)
    while not events.quit_signal:
        agent.client()  # raises, with the end of its log, when the agent is gone
        if failures:
            raise VMwrapperError(str(failures[0]), failures[0].hint)
        events.wait(TICK)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)
