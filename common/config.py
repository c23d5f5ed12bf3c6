"""The guest agent's settings: written by the host agent for one VM, read by that VM's agent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs

from .broker_address import BrokerAddress, Credentials, Dialect, Tls
from .errors import ConfigError

FORMAT = 2


@attrs.frozen
class GuestConfig:
    """Who this guest is and how it reaches its host.

    `brokers` is the fail-over list; `files` the base URL of the host's file port. `credentials` are for the broker;
    `secret` is known to this guest and its host alone, made for one VM instance, and proves who says HELLO.
    """

    guest: str
    host: str
    name: str  # what people call the VM
    brokers: tuple[BrokerAddress, ...]
    credentials: Credentials
    files: str
    secret: str = attrs.field(repr=False)
    dialect: Dialect = Dialect.STOMP
    proxy: str = ""  # the way to the network, for programs; empty: there is none
    boots_again: bool = True  # from the same disk; else its disk ends with its memory, and nothing need be flushed

    def to_json(self) -> bytes:
        value = {
            "format": FORMAT,
            "guest": self.guest,
            "host": self.host,
            "name": self.name,
            "brokers": [_address_to_json(broker) for broker in self.brokers],
            "login": self.credentials.login,
            "passcode": self.credentials.passcode,
            "files": self.files,
            "secret": self.secret,
            "dialect": self.dialect.value,
            "proxy": self.proxy,
            "boots_again": self.boots_again,
        }
        return json.dumps(value).encode("utf-8")

    @classmethod
    def load(cls, path: Path) -> GuestConfig:
        """Read the settings; ConfigError says what is wrong with them."""
        try:
            value: dict[str, Any] = json.loads(path.read_text("utf-8"))
            if value["format"] != FORMAT:
                raise ConfigError(
                    f"{path}: format {value['format']!r} is not {FORMAT}, use an agent that fits the host"
                )
            return cls(
                guest=str(value["guest"]),
                host=str(value["host"]),
                name=str(value["name"]),
                brokers=tuple(_address_from_json(broker) for broker in value["brokers"]),
                credentials=Credentials(str(value["login"]), str(value["passcode"])),
                files=str(value["files"]),
                secret=str(value["secret"]),
                dialect=Dialect(value["dialect"]),
                proxy=str(value.get("proxy", "")),
                boots_again=value.get("boots_again") is not False,
            )
        except OSError as error:
            raise ConfigError(
                f"the guest's settings {path} cannot be read: {error.strerror}",
                "the host agent delivers them when it starts the VM; give their place with --config FILE",
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: these are not a guest agent's settings ({error!r})") from None


def _address_to_json(address: BrokerAddress) -> dict[str, Any]:
    value: dict[str, Any] = {"host": address.host, "port": address.port}
    if address.tls is not None:
        value["tls"] = {"ca": address.tls.ca, "server_name": address.tls.server_name}
    return value


def _address_from_json(value: dict[str, Any]) -> BrokerAddress:
    tls = value.get("tls")
    return BrokerAddress(
        str(value["host"]),
        int(value["port"]),
        Tls(str(tls["ca"]), str(tls["server_name"])) if tls is not None else None,
    )
