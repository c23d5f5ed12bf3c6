"""`vmctl monitor`: the web page for people who run host agents and brokers."""

from __future__ import annotations

import argparse
import os
import stat
import sys
from pathlib import Path
from typing import Any

from common.errors import ConfigError

from .watched import add_broker_option, watched_brokers


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "monitor",
        help="a live web page of hosts, guests, commands, copies and brokers",
        description="Serve a live page of every host agent of this user, and of all that are heard through external "
        "brokers, until Ctrl-C, and metrics for Prometheus at /metrics. On the loopback the address that is printed "
        "opens it; elsewhere it needs a login and TLS.",
    )
    parser.add_argument("--listen", default="127.0.0.1:8640", metavar="[HOST:]PORT", help="(%(default)s)")
    parser.add_argument("--control", action="store_true", help="let the page ping, pause, resume and send signals")
    parser.add_argument("--login", metavar="NAME", help="ask for a login, with --password-file")
    parser.add_argument("--password-file", type=Path, metavar="FILE", help="readable by its owner only")
    parser.add_argument("--certificate", type=Path, metavar="FILE", help="PEM, for TLS")
    parser.add_argument("--key", type=Path, metavar="FILE", help="its private key, PEM")
    parser.add_argument("--name", action="append", default=[], help="a name under which the page is reached")
    add_broker_option(parser)
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    from twisted.internet import reactor

    from common.logs import start_logging

    try:
        from host_agent.metrics_page import split_address
        from host_agent.monitor.access import Login
        from host_agent.monitor.serve import MonitorOptions, build_monitor
    except ImportError as error:
        raise ConfigError(
            f"the monitor needs the Python package {error.name}", "pip install 'vmwrapper[ops]'"
        ) from None
    from host_agent.control_client import endpoints

    start_logging("monitor")
    interface, port = split_address(options.listen)
    if (options.login is None) != (options.password_file is None):
        raise ConfigError("--login and --password-file go together", "give both, or neither")
    login = Login(options.login, _password(options.password_file)) if options.login is not None else None
    server = build_monitor(
        reactor,
        endpoints,
        MonitorOptions(
            interface,
            port,
            options.control,
            login,
            options.certificate,
            options.key,
            tuple(options.name),
            watched_brokers(options.broker),
        ),
    )
    failures: list[ConfigError] = []

    def start() -> None:
        try:
            print(server.start(), flush=True)
        except ConfigError as error:
            failures.append(error)
            reactor.stop()

    reactor.callWhenRunning(start)
    reactor.addSystemEventTrigger("before", "shutdown", server.stop)
    print("vmctl: Ctrl-C ends it", file=sys.stderr)
    reactor.run()
    if failures:
        raise failures[0]
    return 0


def _password(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            if hasattr(os, "getuid") and os.fstat(opened.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise ConfigError(f"others may read the password file {file}", f"chmod 600 {file}")
            password = opened.read(4096).decode("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the password file {file} cannot be read: {error}") from None
    if len(password) < 8:
        raise ConfigError(f"the password in {file} has fewer than 8 characters", "write a longer one")
    return password
