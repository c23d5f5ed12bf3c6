"""`vmctl broker`: the embedded broker by itself, in the foreground; and the way to external ones."""

from __future__ import annotations

import argparse
import hmac
import ipaddress
import os
import secrets
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import ConfigError, VMwrapperError

from . import broker_setup

if TYPE_CHECKING:
    from twisted.internet.interfaces import IListeningPort
    from twisted.python.failure import Failure

    from host_agent.broker.limits import BrokerLimits
    from host_agent.broker.principals import Principal

_DEFAULT_LOGIN = "vmwrapper"


# argparse wants its own subparsers type, which is generic only for type checkers.
def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `broker` command."""
    parser = subparsers.add_parser(
        "broker",
        help="set up and check an external message broker, or run the embedded one",
        description="Without a command: run the embedded STOMP broker until Ctrl-C or SIGTERM. Nothing is kept on "
        "disk. The commands are for external brokers.",
    )
    broker_setup.add_parsers(parser.add_subparsers(metavar="COMMAND"))
    parser.add_argument(
        "--listen", default="127.0.0.1:61613", metavar="HOST:PORT", help="port 0 takes a free one (%(default)s)"
    )
    parser.add_argument("--login", metavar="NAME", help=f"the one login that is let in ({_DEFAULT_LOGIN})")
    parser.add_argument("--passcode-file", type=Path, metavar="FILE", help="holds the login's passcode")
    parser.add_argument("--max-connections", type=int, metavar="N")
    parser.add_argument("--max-body-bytes", type=int, metavar="N", help="the largest body of one frame")
    parser.add_argument("--max-queue-messages", type=int, metavar="N", help="the depth of one queue")
    parser.add_argument("--max-queue-bytes", type=int, metavar="N")
    parser.add_argument("--max-stored-bytes", type=int, metavar="N", help="all queues together")
    parser.add_argument("--verbose", action="store_true", help="log connections to standard error")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    try:
        host, port = broker_setup.listen_address(args.listen)
        if not _is_loopback(host) and args.login is None:
            raise ConfigError(
                f"{host} can be reached from other machines, so the broker needs a login.",
                "Add --login NAME --passcode-file FILE.",
            )
        if (args.login is None) != (args.passcode_file is None):
            raise ConfigError("--login and --passcode-file go together.", "Give both, or neither.")
        limits = _limits(args)
        if args.login is None:
            return _with_own_passcode(host, port, limits, args.verbose)
        return _serve(host, port, args.login, _read_passcode(args.passcode_file), limits, "", args.verbose)
    except VMwrapperError as error:
        print(error.explain(), file=sys.stderr)
        return 1


def _with_own_passcode(host: str, port: int, limits: BrokerLimits, verbose: bool) -> int:
    passcode = secrets.token_urlsafe(24)
    # mkstemp makes the file for its owner only.
    descriptor, name = tempfile.mkstemp(prefix="vmwrapper-broker-", suffix=".passcode")
    path = Path(name)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(passcode + "\n")
        note = f", login {_DEFAULT_LOGIN}, passcode in {path}"
        return _serve(host, port, _DEFAULT_LOGIN, passcode, limits, note, verbose)
    finally:
        path.unlink(missing_ok=True)


def _serve(host: str, port: int, login: str, passcode: str, limits: BrokerLimits, note: str, verbose: bool) -> int:
    from twisted.internet import reactor
    from twisted.logger import globalLogBeginner, textFileLogObserver

    from host_agent.broker.embedded import EmbeddedBroker
    from host_agent.broker.principals import allow_all

    globalLogBeginner.beginLoggingTo(
        [textFileLogObserver(sys.stderr)] if verbose else [], redirectStandardIO=False, discardBuffer=True
    )
    owner = allow_all(login)

    def authenticate(name: str, given: str) -> Principal | None:
        right = hmac.compare_digest(given.encode(), passcode.encode())
        return owner if right and name == login else None

    broker = EmbeddedBroker(reactor, authenticate=authenticate, limits=limits)
    failures: list[str] = []

    def ready(listening: IListeningPort) -> None:
        address = listening.getHost()
        shown = f"[{host}]" if ":" in host else host
        print(f"listening on {shown}:{getattr(address, 'port', port)}{note}", flush=True)

    def not_ready(failure: Failure) -> None:
        failures.append(failure.getErrorMessage())
        reactor.stop()

    def start() -> None:
        broker.listen(host, port).addCallbacks(ready, not_ready)

    reactor.callWhenRunning(start)
    reactor.addSystemEventTrigger("before", "shutdown", broker.stop)
    reactor.run()
    if failures:
        raise ConfigError(
            f"The broker cannot listen on {host}:{port}: {failures[0]}", "Choose another --listen HOST:PORT."
        )
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_passcode(path: Path) -> str:
    try:
        passcode = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The passcode file {path} cannot be read: {error}") from error
    if not passcode:
        raise ConfigError(f"The passcode file {path} is empty.")
    return passcode


def _limits(args: argparse.Namespace) -> BrokerLimits:
    import attrs

    from host_agent.broker.limits import BrokerLimits, FrameLimits

    given = {
        "connections": args.max_connections,
        "queue_messages": args.max_queue_messages,
        "queue_bytes": args.max_queue_bytes,
        "stored_bytes": args.max_stored_bytes,
    }
    for name, value in {**given, "body_bytes": args.max_body_bytes}.items():
        if value is not None and value < 1:
            raise ConfigError(f"The limit {name} cannot be {value}.", "Give a number above 0.")
    frames = FrameLimits() if args.max_body_bytes is None else FrameLimits(body_bytes=args.max_body_bytes)
    return attrs.evolve(
        BrokerLimits(frames=frames), **{name: value for name, value in given.items() if value is not None}
    )
