"""`--broker FILE|URL` of `vmctl monitor` and `vmctl top`: which brokers are listened to, and with what login."""

from __future__ import annotations

import argparse
import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import ConfigError

if TYPE_CHECKING:
    from host_agent.broker.watch import WatchSettings

LOGIN, PASSCODE, PASSCODE_FILE = (
    "VMWRAPPER_MONITOR_LOGIN",
    "VMWRAPPER_MONITOR_PASSCODE",
    "VMWRAPPER_MONITOR_PASSCODE_FILE",
)
DEFAULT_LOGIN = "monitor"


def add_broker_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--broker", action="append", default=[], metavar="FILE|URL",
        help="show an external broker, and all hosts and guests that are heard through it: the monitor.toml that "
        "vmctl broker init wrote, or activemq://HOST:PORT, rabbitmq://… or embedded://… (activemq+tls://…?ca=FILE), "
        f"with the login in {LOGIN} ({DEFAULT_LOGIN}) and its passcode in {PASSCODE} or, a file, {PASSCODE_FILE}; "
        "may be repeated",
    )  # fmt: skip


def watched_brokers(texts: list[str], environment: Mapping[str, str] = os.environ) -> tuple[WatchSettings, ...]:
    """ConfigError says what is wrong with one of them."""
    from host_agent.broker.watch import WatchSettings

    found = [_of_url(text, environment) if "://" in text else WatchSettings.load(Path(text)) for text in texts]
    names = [str(settings.broker) for settings in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"the broker {name} is named twice", "once is enough: all of it is shown")
    return tuple(found)


def _of_url(text: str, environment: Mapping[str, str]) -> WatchSettings:
    from common.broker_address import Credentials, Tls
    from host_agent.broker.settings import read_address, refuse_plain
    from host_agent.broker.watch import KINDS, WatchSettings

    parts = urllib.parse.urlsplit(text)
    # What stands before @ is shown to nobody: it may be a passcode.
    place = parts.netloc.rpartition("@")[2]
    shown = f"{parts.scheme}://{place}"
    if "@" in parts.netloc:
        raise ConfigError(
            f"a login does not belong into the address {shown}: everybody on this machine can read it",
            f"give it in {LOGIN}, and its passcode in {PASSCODE_FILE}",
        )
    kind, _, extra = parts.scheme.partition("+")
    asked = urllib.parse.parse_qs(parts.query, keep_blank_values=True)
    if kind not in KINDS or extra not in ("", "tls") or parts.path not in ("", "/") or set(asked) - {"ca"}:
        raise ConfigError(f"{shown} is no broker's address", f"{' or '.join(f'{kind}://HOST:PORT' for kind in KINDS)}")
    if not extra and "ca" in asked:
        raise ConfigError(f"{shown} has a ca, and no TLS", f"{kind}+tls://{place}?ca=FILE")
    tls = None
    if extra:
        ca = asked.get("ca", [""])[0]
        try:
            tls = Tls(Path(ca).read_text("utf-8") if ca else "", "")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the certificate {ca} cannot be read: {error}") from None
        tls.context()
    try:
        address = read_address(place, tls)
    except ValueError as error:
        raise ConfigError(f"{shown} is no broker's address: {error}") from None
    refuse_plain(Path(shown), (address,), False)
    credentials = Credentials(environment.get(LOGIN, DEFAULT_LOGIN), _passcode(environment))
    return WatchSettings(Path(shown), kind, address, credentials)


def _passcode(environment: Mapping[str, str]) -> str:
    if PASSCODE in environment:
        return environment[PASSCODE]
    file = environment.get(PASSCODE_FILE)
    if file is None:
        raise ConfigError("the passcode of the broker's login is missing", f"{PASSCODE_FILE}=FILE, or {PASSCODE}")
    try:
        return Path(file).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}, which {PASSCODE_FILE} names, cannot be read: {error}") from None
