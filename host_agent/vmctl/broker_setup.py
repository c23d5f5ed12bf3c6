"""`vmctl broker init` and `vmctl broker check`: external brokers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from common.errors import ConfigError

GUESTS = 4


def add_parsers(subparsers: Any) -> None:
    init = subparsers.add_parser(
        "init",
        help="write a ready configuration of ActiveMQ or RabbitMQ",
        description="Write a directory with everything that the broker needs (logins, rights, limits, TLS), a program "
        "`run`, a README, and for each host agent a settings file for --broker.",
    )
    init.add_argument("kind", choices=("activemq", "rabbitmq"))
    init.add_argument("--directory", type=Path, required=True, metavar="DIR", help="new or empty")
    init.add_argument(
        "--host-id", action="append", required=True, metavar="NAME", help="one host agent; again for each other"
    )
    init.add_argument(
        "--guests", type=int, default=GUESTS, metavar="N", help="VMs of each at the same time (%(default)s)"
    )
    init.add_argument("--listen", default="127.0.0.1:61613", metavar="HOST:PORT", help="default: %(default)s")
    init.add_argument(
        "--name", action="append", default=[], metavar="NAME", help="name or address under which agents reach it"
    )
    init.add_argument("--tls", action="store_true", help="with a certificate authority and a certificate made now")
    init.add_argument("--ca", type=Path, metavar="FILE", help="with TLS, and certificates that you have (PEM)")
    init.add_argument("--certificate", type=Path, metavar="FILE")
    init.add_argument("--key", type=Path, metavar="FILE")
    init.add_argument(
        "--allow-plain", action="store_true", help="no TLS, though other machines reach it: the network is protected"
    )
    init.add_argument(
        "--management", type=int, default=0, metavar="PORT",
        help="of RabbitMQ: its management plugin, on the loopback, from which vmctl monitor learns more, more often",
    )  # fmt: skip
    init.set_defaults(func=_init)
    check = subparsers.add_parser(
        "check",
        help="look at a broker through a settings file",
        description="Connect to each broker of a settings file, log in as the host and as every guest, and try what "
        "they may and what they must not. Run it while no host agent uses the file.",
    )
    check.add_argument("file", type=Path, metavar="FILE")
    check.set_defaults(func=_check)


def _init(options: argparse.Namespace) -> int:
    from host_agent.broker.setup.init import GivenCertificate, set_up
    from host_agent.broker.setup.plan import host_logins

    address, port = listen_address(options.listen)
    given = None
    files = (options.ca, options.certificate, options.key)
    if any(files):
        if not all(files):
            raise ConfigError("--ca, --certificate and --key go together", "give all three, or --tls to have them made")
        given = GivenCertificate(*files)
    if not 0 <= options.management < 65536:
        raise ConfigError(f"{options.management} is no port", "--management 15672")
    if port == 0:
        raise ConfigError("a broker that others are to find needs a port of its own", "--listen HOST:PORT")
    plan = set_up(
        options.kind,
        options.directory,
        [host_logins(host, options.guests) for host in options.host_id],
        address=address,
        port=port,
        names=options.name,
        tls=options.tls,
        given=given,
        allow_plain=options.allow_plain,
        management_port=options.management,
    )
    print(f"{plan.directory} is ready; its README.md says how to go on:")
    print(f"  {plan.directory / 'run'}")
    for host in plan.hosts:
        print(f"  vmctl broker check {plan.settings_file(host)}")
    return 0


def _check(options: argparse.Namespace) -> int:
    from host_agent.broker.check import check_broker
    from host_agent.broker.external import lock_settings
    from host_agent.broker.settings import BrokerSettings

    settings = BrokerSettings.load(options.file)
    problems = 0
    with lock_settings(settings):  # we would take a working host agent's messages
        for finding in check_broker(settings):
            problems += not finding.good
            print(f"{'ok   ' if finding.good else 'WRONG'} {finding.sentence}", flush=True)
    if problems:
        print(f"{problems} {'thing is' if problems == 1 else 'things are'} wrong", file=sys.stderr)
    return 1 if problems else 0


def listen_address(text: str) -> tuple[str, int]:
    """HOST:PORT; ConfigError when it is not."""
    host, colon, port = text.rpartition(":")
    host = host.strip("[]")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 65536):
        raise ConfigError(f"{text!r} is not HOST:PORT.", "For example --listen 127.0.0.1:61613")
    return host, int(port)
