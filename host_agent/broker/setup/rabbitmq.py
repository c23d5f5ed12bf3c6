"""A configuration for RabbitMQ 3.10 with its STOMP plugin, as Debian packages it.

RabbitMQ's rights are about exchanges and queues, not about STOMP destinations. `/queue/NAME` publishes through the
default exchange, and who may use that may write to every queue. So each of our destinations is an exchange with a
queue bound to it, of the same name and made beforehand; nobody may configure anything; and the agents send to
`/exchange/NAME` and read `/amq/queue/NAME` (`common/broker_link.py`, `Dialect`). A monitor subscribes to the topics'
exchanges themselves, in queues that the broker makes for as long as it is connected, so that several can watch.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
from typing import Any

from common.files import write_private

from .plan import HostLogins, Login, Plan
from .write import executable, write_readme

PACKAGES = "rabbitmq-server"
WATCHING = "stomp-subscription-"  # how the STOMP plugin names the queues that it makes

_ENVIRONMENT = """\
here=$(cd "$(dirname "$0")" && pwd)
umask 077
export HOME="$here" RABBITMQ_NODENAME="${RABBITMQ_NODENAME:-vmwrapper@localhost}"
export RABBITMQ_MNESIA_BASE="$here/data" RABBITMQ_LOG_BASE="$here/log" RABBITMQ_CONF_ENV_FILE=/dev/null
export RABBITMQ_CONFIG_FILE="$here/rabbitmq" RABBITMQ_ENABLED_PLUGINS_FILE="$here/enabled_plugins"
export RABBITMQ_DIST_PORT="${RABBITMQ_DIST_PORT:-25672}" ERL_EPMD_ADDRESS=127.0.0.1
export RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="-kernel inet_dist_use_interface {127,0,0,1} +S 2:2 +sbwt none"
bin="${RABBITMQ_BIN:-/usr/lib/rabbitmq/bin}"
cd "$here"
"""
_RUN = f"""\
#!/bin/sh
# Runs the broker in the foreground until it gets SIGTERM or Ctrl-C.
set -eu
{_ENVIRONMENT}exec "$bin/rabbitmq-server"
"""
_CTL = f"""\
#!/bin/sh
# rabbitmqctl for this broker, while it runs.
set -eu
{_ENVIRONMENT}exec "$bin/rabbitmqctl" "$@"
"""
_STATISTICS = """\
Statistics: `./ctl -q list_queues name messages message_bytes consumers --formatter=json`, and
`./ctl -q list_connections user state recv_oct send_oct --formatter=json`.
"""


def write(plan: Plan) -> None:
    """Everything in the plan's directory that RabbitMQ needs."""
    folder = plan.directory
    for path in (folder / "data", folder / "log"):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / "rabbitmq.conf").write_text(configuration(plan))
    plugins = ["rabbitmq_stomp", *(["rabbitmq_management"] if plan.management_port else [])]
    (folder / "enabled_plugins").write_text(f"[{','.join(plugins)}].\n")
    write_private(folder / "definitions.json", json.dumps(definitions(plan), indent=1).encode())
    executable(folder / "run", _RUN)
    executable(folder / "ctl", _CTL)
    write_readme(plan, "RabbitMQ", PACKAGES, _STATISTICS)


def configuration(plan: Plan) -> str:
    """rabbitmq.conf."""
    address = f"[{plan.address}]" if ":" in plan.address else plan.address
    listener = "ssl" if plan.tls else "tcp"
    lines = [
        "# Only STOMP: no AMQP, no default user.",
        "listeners.tcp = none",
        f"stomp.listeners.{listener}.1 = {address}:{plan.port}",
        f"stomp.listeners.{'tcp' if plan.tls else 'ssl'} = none",
        f"load_definitions = {plan.directory}/definitions.json",
        f"max_message_size = {plan.limits.frame_bytes}",
        "channel_max = 16",
        "stomp.tcp_listen_options.backlog = 256",
        "stomp.tcp_listen_options.nodelay = true",
        "vm_memory_high_watermark.absolute = 512MB",
        "disk_free_limit.absolute = 50MB",
        "log.console = true",
        "log.console.level = warning",
        "log.file = false",
    ]
    if plan.management_port:
        lines += ["management.tcp.ip = 127.0.0.1", f"management.tcp.port = {plan.management_port}"]
    if plan.tls:
        lines += [
            f"ssl_options.cacertfile = {plan.ca}",
            f"ssl_options.certfile = {plan.server_certificate}",
            f"ssl_options.keyfile = {plan.server_key}",
            "ssl_options.verify = verify_none",
            "ssl_options.versions.1 = tlsv1.3",
            "ssl_options.versions.2 = tlsv1.2",
        ]
    return "\n".join(lines) + "\n"


def definitions(plan: Plan) -> dict[str, Any]:
    """Users, rights, exchanges, queues and policies, as RabbitMQ imports them when it starts."""
    limits = plan.limits
    hosts = [host.host.name for host in plan.hosts]
    guests = [guest.name for host in plan.hosts for guest in host.guests]
    presence, status = "vmwrapper.presence", "vmwrapper.status"
    own = [f"vmwrapper.host.{name}" for name in hosts] + [f"vmwrapper.guest.{name}" for name in guests]
    readers = [f"{presence}.{name}" for name in hosts]
    users = [login for host in plan.hosts for login in (host.host, *host.guests)]
    return {
        "rabbit_version": "3.10.8",
        "vhosts": [{"name": "/"}],
        "users": [_user(plan.monitor, tags="monitoring"), *(_user(login) for login in users)],
        "permissions": [
            *(right for host in plan.hosts for right in _rights(host)),
            _watcher(plan.monitor.name, [presence, status]),
        ],
        "topic_permissions": [],
        "parameters": [],
        "policies": [
            {
                "vhost": "/",
                "name": "vmwrapper",
                "pattern": rf"^(vmwrapper\.|{WATCHING})",
                "apply-to": "queues",
                "priority": 1,
                # A full queue drops its oldest message: the agents send again what still matters, and whoever
                # sends to a dead guest is not held up.
                "definition": {
                    "message-ttl": limits.message_seconds * 1000,
                    "max-length-bytes": limits.queue_bytes,
                    "overflow": "drop-head",
                },
            }
        ],
        "queues": [
            {"vhost": "/", "name": name, "durable": True, "auto_delete": False, "arguments": {}}
            for name in (*own, *readers)
        ],
        "exchanges": [
            {"vhost": "/", "name": name, "type": "fanout", "durable": True, "auto_delete": False, "internal": False,
             "arguments": {}}
            for name in (*own, presence, status)
        ],
        "bindings": [_binding(name, name) for name in own] + [_binding(presence, name) for name in readers],
    }  # fmt: skip


def _rights(host: HostLogins) -> list[dict[str, str]]:
    name = host.host.name
    to_host, presence = re.escape(f"vmwrapper.host.{name}"), re.escape("vmwrapper.presence")
    # One pattern for all guests: for nearly every SEND of a host RabbitMQ compiles the whole pattern of its login anew,
    # which took 1.6 ms with 1,000 names. No other host's guests have such names (`plan.host_logins`).
    guests = re.escape(f"vmwrapper.guest.{name}-g") + "[0-9]+"
    # The host reads its guests' queues, too: it empties one before another guest gets the login.
    own = [to_host, re.escape(f"vmwrapper.presence.{name}"), guests]
    rights = [_right(name, write=[guests, re.escape("vmwrapper.status")], read=own)]
    for guest in host.guests:
        own = [re.escape(f"vmwrapper.guest.{guest.name}")]
        rights.append(_right(guest.name, write=[to_host, presence], read=own))
    return rights


def _right(login: str, *, write: list[str], read: list[str]) -> dict[str, str]:
    return {"user": login, "vhost": "/", "configure": "^$", "write": _any_of(write), "read": _any_of(read)}


def _watcher(login: str, topics: list[str]) -> dict[str, str]:
    """Reads topics through queues of its own, which it makes."""
    own = f"{WATCHING}.*"
    read = _any_of([own, *map(re.escape, topics)])
    return {"user": login, "vhost": "/", "configure": f"^{own}$", "write": f"^{own}$", "read": read}


def _any_of(patterns: list[str]) -> str:
    return f"^({'|'.join(patterns)})$"


def _binding(exchange: str, queue: str) -> dict[str, Any]:
    return {
        "source": exchange, "vhost": "/", "destination": queue, "destination_type": "queue", "routing_key": "",
        "arguments": {},
    }  # fmt: skip


def _user(login: Login, tags: str = "") -> dict[str, Any]:
    # RabbitMQ's own form of a salted hash, so that the file does not hold the passcodes.
    salt = secrets.token_bytes(4)
    digest = hashlib.sha256(salt + login.passcode.encode()).digest()
    return {
        "name": login.name,
        "password_hash": base64.b64encode(salt + digest).decode(),
        "hashing_algorithm": "rabbit_password_hashing_sha256",
        "tags": tags,
        "limits": {"max-connections": 16, "max-channels": 16},
    }
