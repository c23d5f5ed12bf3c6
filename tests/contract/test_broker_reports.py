"""What ActiveMQ, RabbitMQ and the embedded broker tell of themselves, through one interface; the brokers are real."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import attrs
import pytest

from common.broker_address import BrokerAddress, Credentials
from common.errors import ConfigError
from common.stomp_connection import StompConnection
from host_agent.broker.watch import WatchSettings, ask
from tests.brokers import TESTER, TESTER_PASSCODE, RunningBroker, free_port

MESSAGES = 7
SECONDS = 60.0


@pytest.fixture
def settings(external: RunningBroker, monkeypatch: pytest.MonkeyPatch) -> WatchSettings:
    for name, value in external.environment.items():
        if name.startswith(("ERL_", "RABBITMQ_")):
            monkeypatch.setenv(name, value)  # a second broker on one machine has a name of its own
    return WatchSettings.load(external.plan.monitor_settings)


@pytest.fixture
def waiting(external: RunningBroker, settings: WatchSettings) -> Iterator[str]:
    """The name of a queue in which messages wait, of a client that is connected."""
    queue = f"contract.report.{external.plan.kind}"
    credentials = Credentials(TESTER, TESTER_PASSCODE)
    connection = StompConnection(settings.broker, credentials, lambda *_: None, lambda: None)
    assert connection.open(threading.Event()) == ""
    for _ in range(MESSAGES):
        connection.send(f"/queue/{queue}", b"x" * 100)
    yield queue
    connection.subscribe(f"/queue/{queue}", 1)
    connection.close()


def test_a_report_has_what_the_broker_knows(external: RunningBroker, settings: WatchSettings, waiting: str) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        report = ask(settings)
        assert report.problem == ""
        by_name = {queue.name: queue for queue in report.queues}
        if not settings.management or (waiting in by_name and by_name[waiting].messages == MESSAGES):
            break
        assert time.monotonic() < deadline, report
        time.sleep(0.5)  # the management plugin counts now and then
    assert report.kind == external.plan.kind
    assert by_name[waiting].messages == MESSAGES
    assert by_name[waiting].consumers == 0
    assert (by_name[waiting].bytes or 0) >= MESSAGES * 100
    assert "vmwrapper.guest.host-a-g1" in by_name
    assert (report.messages or 0) >= MESSAGES
    assert report.memory_limit_bytes and report.memory_bytes is not None
    # What it cannot tell is unknown, not 0.
    if external.plan.kind == "activemq":
        assert (report.connections or 0) >= 2  # who fills the queue, and we
        assert ask(attrs.evolve(settings, advisories=False)).connections is None
        assert report.dead_letters is not None and (report.enqueued or 0) >= MESSAGES
    else:
        assert (report.connections or 0) >= 1
        assert report.dead_letters is None
        assert (report.enqueued is None) == (not settings.management)
        assert report.version.startswith("3.")


def test_a_login_that_is_refused_is_said(external: RunningBroker, settings: WatchSettings) -> None:
    if external.plan.kind == "activemq":
        wrong = attrs.evolve(settings, credentials=Credentials("monitor", "wrong"))
        assert "refuses the login 'monitor'" in ask(wrong).problem
    elif settings.management:
        assert (
            ask(attrs.evolve(settings, credentials=Credentials("monitor", "wrong"))).problem == "the login is refused"
        )
        host = external.plan.hosts[0].host
        untagged = attrs.evolve(settings, credentials=Credentials(host.name, host.passcode))
        assert "the login" in ask(untagged).problem
    else:
        assert "names neither ctl nor management" in ask(attrs.evolve(settings, ctl=None)).problem
        assert "cannot be run" in ask(attrs.evolve(settings, ctl=Path("/nowhere/ctl"))).problem
        assert "failed" in ask(attrs.evolve(settings, ctl=Path("/bin/false"))).problem


def test_a_broker_that_is_not_there_is_said(tmp_path: Path) -> None:
    nowhere = BrokerAddress("127.0.0.1", free_port())
    settings = WatchSettings(tmp_path, "activemq", nowhere, Credentials("monitor", "x"))
    report = ask(settings)
    assert report.problem == "cannot be reached: connection refused"
    assert report.messages is None and report.unknown


class _Wrong(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.endswith("overview"):
            self.send_response(401)
            self.end_headers()
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

    def log_message(self, *args: object) -> None:
        """Nothing."""


def test_the_management_api_of_another_program(tmp_path: Path) -> None:
    server = HTTPServer(("127.0.0.1", 0), _Wrong)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        settings = WatchSettings(
            tmp_path, "rabbitmq", BrokerAddress("b", 1), Credentials("m", "x"),
            management=f"http://127.0.0.1:{server.server_port}",
        )  # fmt: skip
        assert ask(settings).problem == "the login is refused"
        answer = ask(attrs.evolve(settings, management=f"http://127.0.0.1:{server.server_port}/overview/.."))
        assert answer.problem
    finally:
        server.shutdown()
        server.server_close()
    assert "cannot be reached" in ask(settings).problem


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "'format' is missing"),
        ('format = 1\nkind = "coil"\nbroker = "a:1"\n', "another format or kind"),
        ('format = 1\nkind = "activemq"\nbroker = "far.example:1"\nlogin = "m"\npasscode_file = "p"\n', "no \\[tls\\]"),
        ('format = 1\nkind = "rabbitmq"\nbroker = "localhost:1"\nlogin = "m"\npasscode_file = "p"\n'
         'management = "http://far.example"\n', "carries a passcode"),
        ('format = 1\nkind = "activemq"\nbroker = "localhost:1"\nlogin = "m"\npasscode_file = "p"\n', "cannot be read"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "monitor.toml"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match=sentence):
        WatchSettings.load(file)
