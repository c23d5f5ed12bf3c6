"""`vmctl top`: the monitor's view in a terminal."""

from __future__ import annotations

import argparse
from typing import Any

from common.errors import ConfigError

from .watched import add_broker_option, watched_brokers


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "top",
        help="the monitor's view in a terminal",
        description="Guests, commands, copies, brokers, hosts and events of every host agent of this user, and of all "
        "that are heard through external brokers, live; what is wrong stands first, with the next step. Tab and 1 to 7 "
        "change the table, / filters, q ends it.",
    )
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="between two looks (%(default)s)")
    add_broker_option(parser)
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    try:
        from host_agent.monitor.top import Top
    except ImportError as error:
        raise ConfigError(f"vmctl top needs the Python package {error.name}", "pip install 'vmwrapper[ops]'") from None
    if not 0.2 <= options.every <= 3600:
        raise ConfigError(f"--every wants 0.2 to 3600 seconds, not {options.every:g}")
    Top(options.every, brokers=watched_brokers(options.broker)).run()
    return 0
