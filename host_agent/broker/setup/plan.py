"""What a broker is set up for: its address, its logins, its limits; and the settings files that come of it."""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path

import attrs

from common.errors import ConfigError
from common.files import write_private

HOST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,40}")
MOST_GUESTS = 1000
MONITOR = "monitor"

MIB = 1024 * 1024


@attrs.frozen
class Login:
    """A name and a passcode made for it."""

    name: str
    passcode: str = attrs.field(factory=lambda: secrets.token_urlsafe(24), repr=False)


@attrs.frozen
class HostLogins:
    """One host agent and the guests that it may have at a time."""

    host: Login
    guests: tuple[Login, ...]


@attrs.frozen
class Limits:
    """Policies of the destinations."""

    message_seconds: int = 60  # agents send again what was lost, so nothing needs to wait longer for a dead one
    queue_bytes: int = 64 * MIB
    frame_bytes: int = 4 * MIB


@attrs.frozen
class Plan:
    """Everything that a configuration is written from."""

    kind: str
    directory: Path
    address: str  # on which the broker listens
    port: int
    names: tuple[str, ...]  # under which agents reach it; the first goes into the settings
    tls: bool
    hosts: tuple[HostLogins, ...]
    monitor: Login = attrs.field(factory=lambda: Login(MONITOR))
    limits: Limits = Limits()
    allow_plain: bool = False
    management_port: int = 0  # of RabbitMQ's management plugin, on the loopback; 0: it is off

    @property
    def ca(self) -> Path:
        return self.directory / "tls" / "ca.pem"

    @property
    def server_certificate(self) -> Path:
        return self.directory / "tls" / "server.pem"

    @property
    def server_key(self) -> Path:
        return self.directory / "tls" / "server.key"

    def settings_file(self, host: HostLogins) -> Path:
        """What `--broker` gets."""
        return self.directory / f"{host.host.name}.toml"

    @property
    def monitor_settings(self) -> Path:
        """What `vmctl monitor --broker` gets."""
        return self.directory / "monitor.toml"

    @property
    def monitor_file(self) -> Path:
        return self.directory / "monitor.passcode"


def host_logins(host: str, guests: int) -> HostLogins:
    """New logins for a host agent; ConfigError for names that cannot be."""
    if not HOST_ID.fullmatch(host) or host == MONITOR:
        raise ConfigError(f"{host!r} cannot be a host's id: 1 to 41 letters, digits, '-' and '_'", "--host-id NAME")
    if not 0 < guests <= MOST_GUESTS:
        raise ConfigError(f"{guests} guest logins are not possible: 1 to {MOST_GUESTS}", "--guests N")
    return HostLogins(Login(host), tuple(Login(f"{host}-g{number}") for number in range(1, guests + 1)))


def write_settings(plan: Plan) -> None:
    """The settings file of every host agent, and the monitor's passcode."""
    for host in plan.hosts:
        write_private(plan.settings_file(host), _settings(plan, host).encode())
    write_private(plan.monitor_file, f"{plan.monitor.passcode}\n".encode())
    write_private(plan.monitor_settings, _monitor_settings(plan).encode())


def _place(plan: Plan) -> str:
    name = plan.names[0]
    return f"[{name}]:{plan.port}" if ":" in name else f"{name}:{plan.port}"


def _monitor_settings(plan: Plan) -> str:
    quoted = json.dumps
    lines = [
        "# For vmctl monitor --broker; by vmctl broker init.",
        "format = 1",
        f"kind = {quoted(plan.kind)}",
        f"broker = {quoted(_place(plan))}",
        *(["allow_plain = true"] if plan.allow_plain else []),
        f"login = {quoted(plan.monitor.name)}",
        f"passcode_file = {quoted(plan.monitor_file.name)}",
    ]
    if plan.kind == "activemq":
        lines += ["# The broker tells monitors of its connections.", "advisories = true"]
    if plan.management_port:
        lines += [
            "# The management plugin's HTTP API, on the broker's own machine: it sends the passcode as it is.",
            f"management = {quoted(f'http://127.0.0.1:{plan.management_port}')}",
        ]
    elif plan.kind == "rabbitmq":
        lines += [
            "# The program that asks the broker, on its own machine; or, with the management plugin: management = URL",
            'ctl = "ctl"',
        ]
    if plan.tls:
        lines += ["", "[tls]", 'ca = "tls/ca.pem"']
    return "\n".join(lines) + "\n"


def _settings(plan: Plan, host: HostLogins) -> str:
    quoted = json.dumps  # a JSON string is a TOML string
    place = _place(plan)
    lines = [
        "# For vmwrapper-host-agent --broker; by vmctl broker init. It holds passcodes: keep it private (0600).",
        "format = 1",
        f"kind = {quoted(plan.kind)}",
        "# The fail-over list, the best first.",
        f"brokers = [{quoted(place)}]",
        *(["allow_plain = true"] if plan.allow_plain else []),
        "",
        "# The host agent's id, which is its login and names its queue.",
        f"host = {quoted(host.host.name)}",
        f"passcode = {quoted(host.host.passcode)}",
        "# This broker has a topic on which the host agent tells vmctl monitor of itself.",
        "status = true",
    ]
    if plan.tls:
        lines += [
            "",
            "[tls]",
            "# Relative to this file. The certificate must be for the name in brokers.",
            'ca = "tls/ca.pem"',
        ]
    lines += ["", "# One for each virtual machine that may run at the same time.", "[guests]"]
    lines += [f"{guest.name} = {quoted(guest.passcode)}" for guest in host.guests]
    return "\n".join(lines) + "\n"
