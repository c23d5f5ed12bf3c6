"""The guest agent's settings: written by the host agent for one VM, read by that VM's agent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs

from .broker_link import BrokerAddress, Credentials
from .errors import ConfigError

FORMAT = 1


@attrs.frozen
class GuestConfig:
    """Who this guest is and how it reaches its host.

    `brokers` is the fail-over list; `files` the base URL of the host's file port.
    """

    guest: str
    host: str
    name: str  # what people call the VM
    brokers: tuple[BrokerAddress, ...]
    credentials: Credentials
    secret: str = attrs.field(repr=False)  # proves to the host agent who we are, whatever the broker lets in
    files: str

    def to_json(self) -> bytes:
        value = {
            "format": FORMAT,
            "guest": self.guest,
            "host": self.host,
            "name": self.name,
            "brokers": [[b.host, b.port] for b in self.brokers],
            "login": self.credentials.login,
            "passcode": self.credentials.passcode,
            "secret": self.secret,
            "files": self.files,
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
                brokers=tuple(BrokerAddress(str(host), int(port)) for host, port in value["brokers"]),
                credentials=Credentials(str(value["login"]), str(value["passcode"])),
                secret=str(value["secret"]),
                files=str(value["files"]),
            )
        except OSError as error:
            raise ConfigError(
                f"the guest's settings {path} cannot be read: {error.strerror}",
                "the host agent delivers them when it starts the VM; give their place with --config FILE",
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: these are not a guest agent's settings ({error!r})") from None
