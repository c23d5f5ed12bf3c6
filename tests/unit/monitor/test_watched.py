"""`--broker FILE|URL`: which brokers a monitor listens to, and where its login comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import ConfigError
from host_agent.vmctl.watched import LOGIN, PASSCODE, PASSCODE_FILE, watched_brokers

ENVIRONMENT = {PASSCODE: "a secret"}


def test_an_address_and_a_login_from_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "passcode"
    file.write_text("another\n")
    (one,) = watched_brokers(["rabbitmq://localhost:61613"], ENVIRONMENT)
    assert (one.kind, str(one.broker), one.credentials.login) == ("rabbitmq", "localhost:61613", "monitor")
    assert one.credentials.passcode == "a secret" and one.broker.tls is None
    (two,) = watched_brokers(["activemq+tls://far.example:61614"], {PASSCODE_FILE: str(file), LOGIN: "ops"})
    assert (two.credentials.login, two.credentials.passcode) == ("ops", "another") and two.broker.tls is not None


@pytest.mark.parametrize(
    ("text", "environment", "words"),
    [
        ("activemq://monitor:hunter2@localhost:61613", ENVIRONMENT, "a login does not belong"),
        ("activemq://localhost", ENVIRONMENT, "is not HOST:PORT"),
        ("http://localhost:1", ENVIRONMENT, "no broker's address"),
        ("activemq://localhost:1/x", ENVIRONMENT, "no broker's address"),
        ("activemq://localhost:1?ca=x", ENVIRONMENT, "has a ca, and no TLS"),
        ("activemq+tls://localhost:1?ca=/nowhere", ENVIRONMENT, "cannot be read"),
        ("activemq://far.example:61613", ENVIRONMENT, "have no \\[tls\\]"),
        ("activemq://localhost:61613", {}, "passcode of the broker's login is missing"),
        ("activemq://localhost:61613", {PASSCODE_FILE: "/nowhere"}, "cannot be read"),
        ("/nowhere/monitor.toml", ENVIRONMENT, "cannot be read"),
    ],
)
def test_what_cannot_be_used_says_why_and_shows_no_secret(text: str, environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as found:
        watched_brokers([text], environment)
    assert "hunter2" not in found.value.explain() and "a secret" not in found.value.explain()


def test_a_broker_is_named_once() -> None:
    with pytest.raises(ConfigError, match="named twice"):
        watched_brokers(["activemq://localhost:1", "activemq://localhost:1"], ENVIRONMENT)
