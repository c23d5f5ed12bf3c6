"""The settings file for an external broker, as `vmctl broker init` writes it; `docs/broker.md` describes it."""

from __future__ import annotations

import ipaddress
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from common.broker_address import BrokerAddress, Credentials, Dialect, Tls
from common.errors import ConfigError

FORMAT = 1
DIALECTS = {"activemq": Dialect.STOMP, "rabbitmq": Dialect.RABBITMQ}
_KEYS = {"format", "kind", "brokers", "host", "passcode", "passcode_file", "guests", "tls", "allow_plain", "status"}
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@attrs.frozen
class BrokerSettings:
    """An external broker and the logins on it that one host agent may use."""

    file: Path
    kind: str
    brokers: tuple[BrokerAddress, ...]
    host: Credentials
    guests: Mapping[str, str] = attrs.field(repr=False)  # login: passcode
    status: bool = False  # the broker has the topic on which host agents tell monitors of themselves

    @property
    def dialect(self) -> Dialect:
        return DIALECTS[self.kind]

    @classmethod
    def load(cls, file: Path) -> BrokerSettings:
        """Read the file; ConfigError says what is wrong with it."""
        return cls.from_table(file, read_private(file))

    @classmethod
    def from_table(cls, file: Path, value: dict[str, Any]) -> BrokerSettings:
        """The same from what stood in a file, in the form of `docs/broker.md`."""
        try:
            return _parse(file, value)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ConfigError(f"the broker settings {file} cannot be used: {what}") from None


def read_private(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            # Of what is opened, not of the name: a link or a rename must not come in between.
            mode = os.fstat(opened.fileno()).st_mode
            if hasattr(os, "getuid") and mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise ConfigError(
                    f"others may read the broker settings {file}, which hold passcodes", f"chmod 600 {file}"
                )
            return tomllib.load(opened)
    except OSError as error:
        raise ConfigError(
            f"the broker settings {file} cannot be read: {error.strerror}", "vmctl broker init writes them"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the broker settings {file} are not TOML: {error}") from None


def _parse(file: Path, value: dict[str, Any]) -> BrokerSettings:
    if value["format"] != FORMAT:
        raise ConfigError(f"the broker settings {file} have format {value['format']!r}, not {FORMAT}")
    unknown = sorted(set(value) - _KEYS)
    if unknown:
        raise ConfigError(f"the broker settings {file} have an unknown key {unknown[0]!r}")
    kind = value["kind"]
    if kind not in DIALECTS:
        raise ConfigError(f"the broker settings {file} name a broker kind {kind!r}, not {' or '.join(DIALECTS)}")
    tls = read_tls(file, value.get("tls"))
    brokers = tuple(read_address(text, tls) for text in _texts("brokers", value["brokers"]))
    if not brokers:
        raise ConfigError(f"the broker settings {file} name no broker")
    refuse_plain(file, brokers, bool(value.get("allow_plain", False)))
    passcode = value["passcode"] if "passcode" in value else _read(file, value["passcode_file"]).strip()
    guests = {_id(login): _text("a passcode", code) for login, code in value["guests"].items()}
    host, status = Credentials(_id(value["host"]), _text("passcode", passcode)), value.get("status", False)
    if not isinstance(status, bool):
        raise TypeError("status is neither true nor false")
    return BrokerSettings(file, kind, brokers, host, guests, status)


def read_tls(file: Path, value: Any) -> Tls | None:
    if value is None:
        return None
    unknown = sorted(set(value) - {"ca", "server_name"})
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r} in [tls]")
    tls = Tls(_read(file, value["ca"]) if value.get("ca") else "", str(value.get("server_name", "")))
    tls.context()  # a CA that cannot be used is better found now
    return tls


def _read(file: Path, name: str) -> str:
    path = file.parent / name
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}, which the broker settings {file} name, cannot be read: {error}") from None


def read_address(text: str, tls: Tls | None) -> BrokerAddress:
    host, colon, port = text.rpartition(":")
    host = host.strip("[]")
    if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"{text!r} is not HOST:PORT")
    return BrokerAddress(host, int(port), tls)


def refuse_plain(file: Path, brokers: tuple[BrokerAddress, ...], allowed: bool) -> None:
    for broker in brokers:
        if broker.tls is None and not allowed and not is_loopback(broker.host):
            raise ConfigError(
                f"the broker at {broker} is another machine's, and the settings {file} have no [tls]: "
                "passcodes and commands would cross the network readable and changeable",
                "add [tls] with the ca, or allow_plain = true if the network itself protects them",
            )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _texts(name: str, value: Any) -> list[str]:
    if not isinstance(value, list):
        raise TypeError(f"{name} is not a list")
    return [_text(name, item) for item in value]


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{name} is not a text")
    return value


def _id(value: Any) -> str:
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise ValueError(f"{value!r} is not a login of 1 to 64 letters, digits, '-' and '_'")
    return value
