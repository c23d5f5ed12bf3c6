"""A broker's directory, made whole."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from pathlib import Path

import attrs

from common.errors import ConfigError

from ..settings import DIALECTS, is_loopback
from . import activemq, rabbitmq
from .certificates import make_authority, make_certificate, take_given
from .plan import HostLogins, Limits, Plan, write_settings

WRITERS = {"activemq": activemq.write, "rabbitmq": rabbitmq.write}


@attrs.frozen
class GivenCertificate:
    """The operator's own, in place of those that we make."""

    ca: Path
    certificate: Path
    key: Path


def set_up(
    kind: str,
    directory: Path,
    hosts: Sequence[HostLogins],
    *,
    address: str = "127.0.0.1",
    port: int = 61613,
    names: Sequence[str] = (),
    tls: bool = False,
    given: GivenCertificate | None = None,
    allow_plain: bool = False,
    limits: Limits | None = None,
    management_port: int = 0,
) -> Plan:
    """Write a configuration; ConfigError when the directory holds something or the wishes do not fit together.

    `names` are those under which agents reach the broker; without any it is the address that it listens on.
    `management_port`: RabbitMQ's management plugin listens there, on the loopback; 0: it is off.
    """
    if kind not in DIALECTS:
        raise ConfigError(f"{kind!r} is no broker that we can set up: {' or '.join(DIALECTS)}")
    if management_port and kind != "rabbitmq":
        raise ConfigError(f"{kind} has no management plugin", "ActiveMQ tells its statistics over STOMP")
    with_tls = tls or given is not None
    if not with_tls and not allow_plain and not is_loopback(address):
        raise ConfigError(
            f"{address} can be reached from other machines, so the broker needs TLS",
            "--tls makes a certificate; --allow-plain if the network itself is protected",
        )
    if not names and _is_any(address):
        raise ConfigError(f"{address} stands for every address of the machine", "say how agents reach it: --name NAME")
    reached_by = tuple(names) or (address,)
    hosts = tuple(hosts)
    logins = [host.host.name for host in hosts]
    if not hosts or len(set(logins)) != len(logins):
        raise ConfigError("every host agent needs an id of its own", "--host-id NAME, once for each")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise ConfigError(f"{directory} is not empty", "give a new --directory, or empty this one")
        plan = Plan(
            kind, directory.resolve(), address, port, reached_by, with_tls, hosts, allow_plain=allow_plain,
            limits=limits or Limits(), management_port=management_port,
        )  # fmt: skip
        if with_tls:
            _certificates(plan, given)
        WRITERS[kind](plan)
        write_settings(plan)
    except OSError as error:
        raise ConfigError(f"{error.filename or directory} cannot be written: {error.strerror}") from None
    return plan


def _certificates(plan: Plan, given: GivenCertificate | None) -> None:
    folder = plan.directory / "tls"
    folder.mkdir(mode=0o700)
    if given is not None:
        take_given(folder, given.ca, given.certificate, given.key)
    else:
        make_authority(folder)
        make_certificate(folder, plan.names)


def _is_any(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_unspecified
    except ValueError:
        return False
