"""`vmwrapper-host-agent`: drives virtual machines and does what its control interface is asked."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from common.errors import ConfigError, VMwrapperError
from common.lean import import_twisted

from . import __version__
from .hypervisors.choice import add_option, make_hypervisor

BROKER_VARIABLE = "VMWRAPPER_BROKER"
LOG_FORMAT_VARIABLE = "VMWRAPPER_LOG_FORMAT"


def main(argv: list[str] | None = None) -> int:
    """Run until told to end. 0: ended as told; 1: could not start."""
    parser = argparse.ArgumentParser(
        prog="vmwrapper-host-agent",
        description="Starts virtual machines and runs commands in them, as its control interface is asked "
        "(vmctl, the wrapper). Prints where it listens as one line of JSON.",
    )
    add_option(parser)
    parser.add_argument(
        "--owned",
        action="store_true",
        help="end when standard input ends: its writer is the owner. Its VMs then wait for a while for an agent with "
        "the same --state; without --state they end too",
    )
    parser.add_argument(
        "--state",
        type=Path,
        metavar="DIR",
        help="keep what a successor needs there: an agent that was killed and is started again with the same DIR "
        "takes its virtual machines over, with the commands that run in them (default: a directory that is removed)",
    )
    parser.add_argument(
        "--broker",
        type=Path,
        metavar="FILE",
        default=os.environ.get(BROKER_VARIABLE) or None,
        help="settings of an external message broker (vmctl broker init writes them); default: the file that the "
        f"environment variable {BROKER_VARIABLE} names, else the embedded broker",
    )
    parser.add_argument(
        "--metrics",
        metavar="[HOST:]PORT",
        help="serve metrics for Prometheus at http://HOST:PORT/metrics, on the loopback (default: none)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings of the first VM controller, HostConfig.cfg: broker, hypervisor, XML-RPC; they go before options",
    )
    parser.add_argument(
        "--xmlrpc",
        metavar="[HOST:]PORT",
        help="serve the first VM controller's XML-RPC interface at http://HOST:PORT/RPC2, on the loopback, for "
        "everybody on this host (default: none)",
    )
    parser.add_argument(
        "--log",
        type=Path,
        metavar="FILE",
        help="log there instead of to standard error; rotated at 4 MiB, two are kept",
    )
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        default=os.environ.get(LOG_FORMAT_VARIABLE, "text"),
        help=f"lines for people or for programs (default: {LOG_FORMAT_VARIABLE}, else text)",
    )
    parser.add_argument("--debug", action="store_true", help="log more")
    parser.add_argument("--version", action="version", version=f"vmwrapper-host-agent {__version__}")
    options = parser.parse_args(argv)
    try:
        return _run(options)
    except VMwrapperError as error:
        print(f"vmwrapper-host-agent: {error.explain()}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    import gc

    import_twisted()
    from twisted.internet import reactor
    from twisted.internet.defer import Deferred
    from twisted.internet.stdio import StandardIO
    from twisted.python.failure import Failure

    from common.logs import LogFormat, start_logging

    from .agent import build_host_agent
    from .broker.settings import BrokerSettings
    from .control import Endpoint
    from .controller_config import BROKER_DEADLINE, ControllerConfig
    from .state import open_state
    from .vms import Fate

    try:
        log = start_logging("host-agent", debug=options.debug, form=LogFormat(options.log_format), file=options.log)
    except OSError as error:
        raise ConfigError(f"the log {options.log} cannot be written: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{LOG_FORMAT_VARIABLE} must be text or json, not {options.log_format!r}") from None
    code = 0

    def stopped() -> None:
        if reactor.running:
            reactor.stop()

    try:
        external = BrokerSettings.load(Path(options.broker)) if options.broker is not None else None
        config = ControllerConfig()
        if options.config is not None:
            config = ControllerConfig.load(options.config)
            external = config.broker or external
            for sentence in config.remarks:
                print(f"vmwrapper-host-agent: {sentence}", file=sys.stderr)
        hypervisor = make_hypervisor(config.hypervisor or options.hypervisor, reactor)
        state = open_state(options.state)
    except VMwrapperError as error:
        print(f"vmwrapper-host-agent: cannot start: {error.explain()}", file=sys.stderr)
        return 1
    log.about["agent"] = state.agent_id
    agent = build_host_agent(reactor, hypervisor, state, stopped, external, config.chirp_path)

    def ready(endpoint: Endpoint) -> None:
        if options.metrics is not None:
            metrics(options.metrics)
        if address := config.xmlrpc or options.xmlrpc:
            xmlrpc(address)
        print(json.dumps({**endpoint.to_json(), "ready": True}), flush=True)
        if options.owned:
            StandardIO(_owner_protocol(agent.owner_gone))

    def metrics(address: str) -> None:
        try:
            from .metrics_page import serve_metrics
        except ImportError as error:
            raise ConfigError(
                f"--metrics needs the Python package {error.name}", "pip install 'vmwrapper[ops]'"
            ) from None
        port: Any = serve_metrics(reactor, address, agent.id, agent.observation)
        print(f"vmwrapper-host-agent: metrics on port {port.getHost().port}", file=sys.stderr)

    def xmlrpc(address: str) -> None:
        from .xmlrpc import serve_xmlrpc

        port: Any = serve_xmlrpc(reactor, address, agent.operations, config.vm_gc_grace)
        print(f"vmwrapper-host-agent: XML-RPC on port {port.getHost().port}", file=sys.stderr)

    def failed(failure: Failure) -> None:
        nonlocal code
        code = 1
        print(f"vmwrapper-host-agent: cannot start: {failure.getErrorMessage()}", file=sys.stderr)
        agent.shut_down(Fate.LEAVE)  # our owner may be what failed, and its successor wants the VMs

    def begin() -> None:
        patience = BROKER_DEADLINE if config.broker is not None else 0.0
        Deferred.fromCoroutine(agent.start(patience)).addCallback(ready).addErrback(failed)

    gc.freeze()  # what was imported is not garbage, and need not be looked at again and again
    reactor.callWhenRunning(begin)
    # A signal: this computer may be shutting down. What has a checkpoint goes on from it at the next start.
    reactor.addSystemEventTrigger("before", "shutdown", agent.shut_down, Fate.KEEP)
    reactor.run()
    return code


def _owner_protocol(owner_gone: Any) -> Any:
    """Standard input as a life line: nothing is read from it, its end is the owner's."""
    from twisted.internet.protocol import Protocol, connectionDone
    from twisted.python.failure import Failure

    class Owner(Protocol):
        def connectionLost(self, reason: Failure = connectionDone) -> None:
            owner_gone()

    return Owner()


if __name__ == "__main__":
    sys.exit(main())
