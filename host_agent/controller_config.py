"""The settings file of the first VM controller, `HostConfig.cfg`: its keys, and what each means here."""

from __future__ import annotations

import configparser
import os
import secrets
import stat
from pathlib import Path
from typing import Any

import attrs

from common.errors import ConfigError

from .broker.settings import BrokerSettings
from .hypervisors.choice import HYPERVISORS

BROKER_DEADLINE = 150.0  # seconds for a broker that is started beside us, in Java, on a busy machine
MOST_BYTES = 1024 * 1024
STOMP_PORT = 61613
ANONYMOUS_GUESTS = 8  # at a time, on a broker that lets everybody in

# What the original needed, and we do not.
_UNUSED = {
    ("Host", "network_interface"): "each virtual machine has a network of its own",
    ("Hypervisor", "hypervisor_helpers_path"): "there are no helper scripts",
}


@attrs.frozen
class ControllerConfig:
    """What a host agent takes from the file; nothing of it is required."""

    broker: BrokerSettings | None = None  # None: the embedded one
    hypervisor: str = ""  # "": what the command line says
    xmlrpc: str = ""  # HOST:PORT; "": none
    chirp_path: Path | None = None  # where chirp_put and chirp_get are
    vm_gc_grace: float = 0.0  # seconds without a word after which a VM is no longer listed; 0: ours
    remarks: tuple[str, ...] = ()  # for people

    @classmethod
    def load(cls, file: Path) -> ControllerConfig:
        """Read the file; ConfigError says what is wrong with it. Relative paths in it start where we were started."""
        parser = _read(file)
        try:
            return _parse(file, parser)
        except (ValueError, configparser.Error) as error:
            raise ConfigError(f"the settings {file} cannot be used: {error}") from None


def _read(file: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)  # a passcode may have a '%'
    parser.optionxform = str  # type: ignore[assignment]  # guests' logins keep their case
    try:
        with file.open("r", encoding="utf-8") as opened:
            text = opened.read(MOST_BYTES)
            mode = os.fstat(opened.fileno()).st_mode
        parser.read_string(text, str(file))
    except OSError as error:
        raise ConfigError(f"the settings {file} cannot be read: {error.strerror}") from None
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"the settings {file} cannot be read: {' '.join(str(error).split())}") from None
    secret = parser.get("Broker", "password", fallback="") or parser.has_section("Guests")
    if secret and hasattr(os, "getuid") and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"others may read the settings {file}, which hold passcodes", f"chmod 600 {file}")
    return parser


def _parse(file: Path, parser: configparser.ConfigParser) -> ControllerConfig:
    hypervisor = parser.get("Hypervisor", "hypervisor", fallback="").strip().lower()
    if hypervisor and hypervisor not in HYPERVISORS:
        raise ValueError(f"hypervisor is {hypervisor!r}, not one of {', '.join(HYPERVISORS)}")
    chirp = parser.get("Host", "chirp_path", fallback="").strip()
    port = parser.get("Host", "xmlrpc_port", fallback="").strip()
    listen_on = parser.get("Host", "xmlrpc_listen_on", fallback="").strip() or "127.0.0.1"
    grace = parser.get("Host", "vm_gc_grace", fallback="").strip()
    remarks = [
        f"{file.name}: {key} in [{section}] has no effect: {why}"
        for (section, key), why in _UNUSED.items()
        if parser.get(section, key, fallback="").strip()
    ]
    if grace and not 0 < float(grace) < float("inf"):
        raise ValueError(f"vm_gc_grace is {grace}, not a number of seconds")
    return ControllerConfig(
        broker=_broker(file, parser),
        hypervisor=hypervisor,
        xmlrpc=f"{listen_on}:{port}" if port else "",
        chirp_path=Path(chirp).absolute() if chirp else None,
        vm_gc_grace=float(grace or 0.0),
        remarks=tuple(remarks),
    )


def _broker(file: Path, parser: configparser.ConfigParser) -> BrokerSettings | None:
    """[Broker], and beside the original's keys: `kind`, `allow_plain`, and [Guests] with a login for each VM."""
    host = parser.get("Broker", "host", fallback="").strip()
    if not host:
        return None
    port = parser.getint("Broker", "port", fallback=STOMP_PORT)
    user = parser.get("Broker", "username", fallback="").strip()
    guests = dict(parser.items("Guests")) if parser.has_section("Guests") else {}
    if not guests:
        if user:
            raise ConfigError(
                f"{file} has a username for its broker, but no [Guests]",
                "add the section [Guests] with lines LOGIN = PASSCODE, one for each VM that may run at a time",
            )
        # A broker that asks nobody who they are: logins only name the queues.
        guests = {f"g-{secrets.token_hex(8)}": secrets.token_urlsafe(16) for _ in range(ANONYMOUS_GUESTS)}
    value: dict[str, Any] = {
        "format": 1,
        "kind": parser.get("Broker", "kind", fallback="activemq"),
        "brokers": [f"{host}:{port}"],
        "host": user or f"h-{secrets.token_hex(8)}",
        "passcode": parser.get("Broker", "password", fallback="") or secrets.token_urlsafe(16),
        "guests": guests,
        "allow_plain": parser.getboolean("Broker", "allow_plain", fallback=False),
    }
    return BrokerSettings.from_table(file, value)
