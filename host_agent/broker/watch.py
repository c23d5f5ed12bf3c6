"""Asking an external broker how it does: ActiveMQ's statistics plugin over STOMP, RabbitMQ's management API or `ctl`.

All of it blocks, so it is called in a thread. Whatever cannot be had is None in the report; a broker that cannot be
asked at all is a report with a `problem`.
"""

from __future__ import annotations

import base64
import json
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from common.broker_address import BrokerAddress, Credentials, Dialect
from common.errors import ConfigError
from common.stomp_connection import StompConnection

from .report import BrokerReport, QueueReport, deepest
from .settings import DIALECTS, FORMAT, is_loopback, read_address, read_private, read_tls, refuse_plain

ANSWER_SECONDS = 15.0
CTL_SECONDS = 60.0
MOST_ANSWER = 16 * 1024 * 1024  # bytes
_KEYS = {"format", "kind", "broker", "login", "passcode_file", "tls", "allow_plain", "ctl", "management", "advisories"}
KINDS = (*DIALECTS, "embedded")  # vmctl broker: it is heard, and tells no statistics to others
_REPLIES = "/temp-queue/statistics"
_ADVISORIES = 2  # the subscription
DEAD_LETTERS = "ActiveMQ.DLQ"


@attrs.frozen
class WatchSettings:
    """`monitor.toml`, as `vmctl broker init` writes it."""

    file: Path
    kind: str
    broker: BrokerAddress
    credentials: Credentials
    ctl: Path | None = None
    management: str = ""
    advisories: bool = False  # ActiveMQ's: the login may read them

    @property
    def dialect(self) -> Dialect:
        return DIALECTS.get(self.kind, Dialect.STOMP)

    @classmethod
    def load(cls, file: Path) -> WatchSettings:
        """ConfigError says what is wrong with the file."""
        value = read_private(file)
        try:
            return _parse(file, value)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ConfigError(f"{file} cannot be used: {what}", "vmctl broker init writes monitor.toml") from None


def _parse(file: Path, value: dict[str, Any]) -> WatchSettings:
    unknown = sorted(set(value) - _KEYS)
    if unknown or value["format"] != FORMAT or value["kind"] not in KINDS:
        raise ValueError(f"unknown key {unknown[0]!r}" if unknown else "another format or kind of broker")
    address = read_address(value["broker"], read_tls(file, value.get("tls")))
    refuse_plain(file, (address,), bool(value.get("allow_plain", False)))
    management = str(value.get("management", ""))
    if management:
        parts = urllib.parse.urlsplit(management)
        if parts.scheme not in ("http", "https") or (parts.scheme == "http" and not is_loopback(parts.hostname or "")):
            raise ValueError("management must be an https URL, or http on the loopback: it carries a passcode")
    passcode_file = file.parent / str(value["passcode_file"])
    try:
        passcode = passcode_file.read_text("utf-8").strip()
    except OSError as error:
        raise ConfigError(f"{passcode_file} cannot be read: {error.strerror}") from None
    ctl = file.parent.absolute() / str(value["ctl"]) if value.get("ctl") else None
    return WatchSettings(
        file, value["kind"], address, Credentials(str(value["login"]), passcode), ctl, management,
        bool(value.get("advisories", False)),
    )  # fmt: skip


def ask(settings: WatchSettings) -> BrokerReport:
    """Blocks; never fails."""
    if settings.kind == "embedded":
        return BrokerReport(settings.kind, str(settings.broker))
    how: Callable[[WatchSettings], BrokerReport] = ask_activemq
    if settings.kind == "rabbitmq":
        how = ask_management if settings.management else ask_ctl
    try:
        return how(settings)
    except _NotToBeHad as error:
        problem = str(error)
    except Exception as error:  # what a broker says is its own matter; the page stays up
        problem = f"its answer is not understood ({error!r:.200})"
    return BrokerReport(settings.kind, str(settings.broker), problem=problem)


class _NotToBeHad(Exception):
    """Why there is no report."""


# -- ActiveMQ


def ask_activemq(settings: WatchSettings) -> BrokerReport:
    """The answers come in the order of the questions: that about the broker says that all queues have answered.

    Before them, to whoever subscribes to its advisories, the broker tells of each connection that there is.
    """
    answers: list[dict[str, Any]] = []
    connected: set[str] = set()
    done = threading.Event()
    connection: StompConnection

    def receive(_: StompConnection, number: int, body: bytes) -> None:
        if number == _ADVISORIES:
            _count_connection(json.loads(body), connected)
            return
        answer = _statistics(body)
        answers.append(answer)
        if "destinationName" not in answer:
            done.set()

    connection = StompConnection(settings.broker, settings.credentials, receive, done.set)
    try:
        if reason := connection.open(threading.Event()):
            raise _NotToBeHad(reason)
        if settings.advisories:
            connection.subscribe(
                "/topic/ActiveMQ.Advisory.Connection", _ADVISORIES, {"transformation": "jms-advisory-json"}
            )
        connection.subscribe(_REPLIES, 1, {"transformation": "jms-map-json"})
        for about in ("Destination.>", "Broker"):
            connection.send(f"/queue/ActiveMQ.Statistics.{about}", b"", {"reply-to": _REPLIES})
        if not done.wait(ANSWER_SECONDS):
            raise _NotToBeHad(f"it did not answer within {ANSWER_SECONDS:.0f} s; is its statistics plugin on?")
        if connection.lost.is_set():
            raise _NotToBeHad(connection.reason)
    finally:
        connection.close()
    queues = [_activemq_queue(answer) for answer in answers if "destinationName" in answer]
    broker = next(answer for answer in answers if "destinationName" not in answer)
    return BrokerReport(
        kind="activemq",
        name=str(settings.broker),
        connections=len(connected) if settings.advisories else None,
        consumers=broker.get("consumerCount"),
        messages=sum(queue.messages or 0 for queue in queues),
        bytes=sum(queue.bytes or 0 for queue in queues),
        memory_bytes=broker.get("memoryUsage"),
        memory_limit_bytes=broker.get("memoryLimit"),
        enqueued=broker.get("enqueueCount"),
        dequeued=broker.get("dequeueCount"),
        expired=broker.get("expiredCount"),
        # The queue is made with the first of them.
        dead_letters=sum(queue.messages or 0 for queue in queues if queue.name == DEAD_LETTERS),
        queues=deepest(queues),
    )


def _count_connection(advisory: dict[str, Any], connected: set[str]) -> None:
    """Of a connection that is there, or that has ended meanwhile."""
    if "ConnectionInfo" in advisory:
        connected.add(str(advisory["ConnectionInfo"]["connectionId"]["value"]))
    elif "RemoveInfo" in advisory:
        connected.discard(str(advisory["RemoveInfo"]["objectId"]["value"]))


def _activemq_queue(answer: dict[str, Any]) -> QueueReport:
    return QueueReport(
        name=str(answer["destinationName"]).rpartition("//")[2],
        messages=answer.get("size"),
        bytes=answer.get("memoryUsage"),
        consumers=answer.get("consumerCount"),
        enqueued=answer.get("enqueueCount"),
        dequeued=answer.get("dequeueCount"),
        expired=answer.get("expiredCount"),
    )


def _statistics(body: bytes) -> dict[str, Any]:
    """A JMS map in XStream's JSON: [{"string": "size", "long": 3}, {"string": ["brokerName", "x"]}, …]."""
    found: dict[str, Any] = {}
    for entry in json.loads(body)["map"]["entry"]:
        name = entry["string"]
        if isinstance(name, list):
            found[str(name[0])] = str(name[1])
        else:
            (value,) = (value for key, value in entry.items() if key != "string")
            found[str(name)] = value
    return found


# -- RabbitMQ


def ask_ctl(settings: WatchSettings) -> BrokerReport:
    """By rabbitmqctl on the broker's own machine. It counts no messages that have passed."""
    if settings.ctl is None:
        raise _NotToBeHad(f"{settings.file} names neither ctl nor management")
    status = _ctl(settings.ctl, "status")
    queues = _ctl(settings.ctl, "list_queues", "name", "messages", "message_bytes", "consumers")
    connections = _ctl(settings.ctl, "list_stomp_connections", "conn_name")
    reports = [
        QueueReport(
            str(each["name"]),
            messages=each.get("messages"),
            bytes=each.get("message_bytes"),
            consumers=each.get("consumers"),
        )
        for each in queues
    ]
    return BrokerReport(
        kind="rabbitmq",
        name=str(settings.broker),
        version=str(status.get("rabbitmq_version", "")),
        connections=len(connections),
        consumers=sum(report.consumers or 0 for report in reports),
        messages=sum(report.messages or 0 for report in reports),
        bytes=sum(report.bytes or 0 for report in reports),
        memory_bytes=status["memory"]["total"].get("rss"),
        memory_limit_bytes=status.get("vm_memory_high_watermark_limit"),
        queues=deepest(reports),
    )


def _ctl(program: Path, *words: str) -> Any:
    try:
        done = subprocess.run(
            [str(program), "-q", *words, "--formatter=json"],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=CTL_SECONDS, check=False,
        )  # fmt: skip
    except OSError as error:
        raise _NotToBeHad(f"{program} cannot be run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise _NotToBeHad(f"{program} {words[0]} did not end within {CTL_SECONDS:.0f} s") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).decode("utf-8", "replace").split())
        raise _NotToBeHad(f"{program.name} {words[0]} failed: {said[:200] or done.returncode}")
    return json.loads(done.stdout or b"[]")


def ask_management(settings: WatchSettings) -> BrokerReport:
    """By the HTTP API of RabbitMQ's management plugin; its login needs the tag `monitoring`."""
    overview = _get(settings, "overview")
    nodes = _get(settings, "nodes")
    queues = _get(settings, "queues")
    passed = overview.get("message_stats", {})
    reports = [
        QueueReport(
            str(each["name"]),
            messages=each.get("messages"),
            bytes=each.get("message_bytes"),
            consumers=each.get("consumers"),
            enqueued=each.get("message_stats", {}).get("publish"),
            dequeued=each.get("message_stats", {}).get("deliver_get"),
        )
        for each in queues
    ]
    return BrokerReport(
        kind="rabbitmq",
        name=str(settings.broker),
        version=str(overview.get("rabbitmq_version", "")),
        connections=overview.get("object_totals", {}).get("connections"),
        consumers=overview.get("object_totals", {}).get("consumers"),
        messages=overview.get("queue_totals", {}).get("messages"),
        bytes=sum(report.bytes or 0 for report in reports),
        memory_bytes=sum(node.get("mem_used") or 0 for node in nodes),
        memory_limit_bytes=sum(node.get("mem_limit") or 0 for node in nodes),
        enqueued=passed.get("publish"),
        dequeued=passed.get("deliver_get"),
        queues=deepest(reports),
    )


def _get(settings: WatchSettings, what: str) -> Any:
    login = f"{settings.credentials.login}:{settings.credentials.passcode}"
    request = urllib.request.Request(  # noqa: S310  (the scheme was looked at when the settings were read)
        f"{settings.management.rstrip('/')}/api/{what}",
        headers={"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:  # noqa: S310
            return json.loads(answer.read(MOST_ANSWER))
    except urllib.error.HTTPError as error:
        why = "the login is refused" if error.code == 401 else "the login needs the tag monitoring"
        raise _NotToBeHad(why if error.code in (401, 403) else f"the management API answers {error.code}") from None
    except (urllib.error.URLError, OSError) as error:
        raise _NotToBeHad(f"{settings.management} cannot be reached: {getattr(error, 'reason', error)}") from None


def pause_of(settings: WatchSettings) -> float:
    """Seconds between two questions: rabbitmqctl starts an Erlang each time."""
    return 30.0 if settings.kind == "rabbitmq" and not settings.management else 5.0
