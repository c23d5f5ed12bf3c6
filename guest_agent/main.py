"""`vmwrapper-guest-agent`: starts the keeper, then the agent."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

from . import VERSION

CONFIG = "/run/vmwrapper/config.json"


def main(argv: list[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT. 0: ended as told; 2: settings that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="vmwrapper-guest-agent",
        description="Does the commands and copies that a host agent sends through a message broker. "
        "It runs inside a virtual machine, or as an ordinary process for a trial.",
    )
    parser.add_argument(
        "--config", type=Path, default=Path(CONFIG), help=f"the settings that the host agent made (default: {CONFIG})"
    )
    parser.add_argument(
        "--home",
        type=Path,
        default=Path.home(),
        help="the directory that all paths of commands and copies are relative to (default: the user's home)",
    )
    parser.add_argument("--host-line", action="store_true", help="standard input is a line to the host (in images)")
    parser.add_argument("--log-format", choices=("text", "json"), default="text", help="lines for people or programs")
    parser.add_argument("--debug", action="store_true", help="log more")
    parser.add_argument("--version", action="version", version=f"vmwrapper-guest-agent {VERSION}")
    options = parser.parse_args(argv)

    from common.files import GUEST_STATE, keeper_socket

    home: Path = options.home.absolute()
    state = home / GUEST_STATE
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "fork"):
        _ensure_keeper(keeper_socket(home))  # forked now, while this process is small and has no threads
    return _run_agent(options.config, home, options.host_line, options.log_format, options.debug)


def _ensure_keeper(path: Path) -> None:
    """Use the keeper that an earlier agent left running, else start one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
            return
        except OSError:
            pass
    from .keeper import start_keeper

    start_keeper(path)


def _run_agent(config_path: Path, home: Path, host_line: bool, log_format: str, debug: bool) -> int:
    import gc

    from common.lean import import_twisted

    from .emulated import hash_plainly

    hash_plainly()
    gc.disable()  # none of what is imported is garbage
    import_twisted()
    from twisted.internet import reactor

    from common.config import GuestConfig
    from common.errors import VMwrapperError
    from common.files import keeper_socket
    from common.logs import LogFormat, start_logging

    from .agent import build_guest_agent
    from .ground import Ground, connect_keeper, rehearse
    from .host_line import HostLine, wait_for_settings

    gc.freeze()
    gc.enable()
    log = start_logging("guest-agent", debug=debug, form=LogFormat(log_format))
    ground = None
    if host_line and not config_path.exists():
        import random

        ground = Ground.of(home, connect_keeper(keeper_socket(home)))
        rehearse()
        wait_for_settings(config_path)
        random.seed()  # this machine is one of several clones
    try:
        config = GuestConfig.load(config_path)
    except VMwrapperError as error:
        print(f"vmwrapper-guest-agent: {error.explain()}", file=sys.stderr)
        return 2
    log.about.update(vm=config.name, instance=config.guest)
    agent = build_guest_agent(reactor, config, home, ground)
    if host_line:
        HostLine(reactor, agent.restored, agent.settings_changed, agent.host_is_there).start()
    reactor.addSystemEventTrigger("before", "shutdown", agent.stop)
    reactor.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
