"""`vmctl broker init` and the settings files that it writes."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import pytest

from common.broker_address import Dialect
from common.errors import ConfigError
from host_agent.broker.settings import BrokerSettings
from host_agent.broker.setup.init import GivenCertificate, set_up
from host_agent.broker.setup.plan import host_logins
from host_agent.vmctl.main import main

KINDS = ("activemq", "rabbitmq")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tls", [False, True])
def test_the_directory_has_what_the_readme_says(tmp_path: Path, kind: str, tls: bool) -> None:
    plan = set_up(kind, tmp_path / "b", [host_logins("anna", 2), host_logins("berta", 1)], names=["localhost"], tls=tls)
    settings = BrokerSettings.load(plan.directory / "anna.toml")
    assert settings.host.login == "anna"
    assert list(settings.guests) == ["anna-g1", "anna-g2"]
    assert settings.dialect is (Dialect.RABBITMQ if kind == "rabbitmq" else Dialect.STOMP)
    [broker] = settings.brokers
    assert (broker.host, broker.port) == ("localhost", 61613)
    assert (broker.tls is not None) == tls
    readme = (plan.directory / "README.md").read_text()
    for name in ("anna.toml", "berta.toml", "monitor.passcode", "./run"):
        assert name in readme
    assert os.access(plan.directory / "run", os.X_OK)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_secret_can_be_read_by_others(tmp_path: Path, kind: str) -> None:
    plan = set_up(kind, tmp_path / "b", [host_logins("anna", 3)], tls=True)
    logins = [plan.monitor, *(login for host in plan.hosts for login in (host.host, *host.guests))]
    secrets = [login.passcode.encode() for login in logins] + [b"PRIVATE KEY"]
    for path in plan.directory.rglob("*"):
        if path.is_file() and any(secret in path.read_bytes() for secret in secrets):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(plan.directory.stat().st_mode) == 0o700
    assert len(set(secrets)) == len(secrets)


def test_rabbitmqs_rights_are_whole_names_and_no_agent_configures(tmp_path: Path) -> None:
    plan = set_up("rabbitmq", tmp_path / "b", [host_logins("an-na", 1), host_logins("berta", 1)])
    value = json.loads((plan.directory / "definitions.json").read_text())
    for right in value["permissions"]:
        # Of the monitor, queues that go with its connection.
        assert right["configure"] == ("^stomp-subscription-.*$" if right["user"] == "monitor" else "^$")
        for kind in ("write", "read"):
            assert right[kind].startswith("^") and right[kind].endswith("$")
            assert not re.search(right[kind], "amq.default")
    guest = next(right for right in value["permissions"] if right["user"] == "an-na-g1")
    assert re.search(guest["read"], "vmwrapper.guest.an-na-g1")
    assert not re.search(guest["read"], "vmwrapper.guest.an-na-g12")
    assert not re.search(guest["read"], "vmwrapperxguest.an-na-g1")
    assert "passcode" not in json.dumps(value) and plan.monitor.passcode not in json.dumps(value)


def test_a_rabbitmq_host_may_write_to_its_guests_alone_by_a_pattern_that_does_not_grow(tmp_path: Path) -> None:
    """RabbitMQ compiles the pattern anew for nearly every SEND: one of 1,000 names took it 1.6 ms."""
    hosts = [host_logins("anna", 1000), host_logins("anna-g1-g", 2), host_logins("an", 2)]
    plan = set_up("rabbitmq", tmp_path / "b", hosts)
    value = json.loads((plan.directory / "definitions.json").read_text())
    rights = {right["user"]: right for right in value["permissions"]}
    for host in plan.hosts:
        mine = {f"vmwrapper.guest.{guest.name}" for guest in host.guests}
        for kind, others in (("write", {"vmwrapper.status"}), ("read", {f"vmwrapper.host.{host.host.name}"})):
            pattern = rights[host.host.name][kind]
            assert len(pattern) < 200
            allowed = {exchange["name"] for exchange in value["exchanges"] if re.search(pattern, exchange["name"])}
            assert allowed == mine | others


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"address": "0.0.0.0"}, "needs TLS"),
        ({"address": "192.0.2.7"}, "needs TLS"),
        ({"address": "0.0.0.0", "tls": True}, "stands for every address"),
        ({"hosts": ["anna", "anna"]}, "id of its own"),
        ({"hosts": ["an na"]}, "cannot be a host's id"),
        ({"hosts": ["monitor"]}, "cannot be a host's id"),
        ({"guests": 0}, "guest logins are not possible"),
    ],
)
def test_what_cannot_be_set_up_says_why(tmp_path: Path, options: dict[str, object], words: str) -> None:
    wishes = dict(options)
    with pytest.raises(ConfigError, match=words):
        hosts = [host_logins(name, wishes.pop("guests", 1)) for name in wishes.pop("hosts", ["anna"])]  # type: ignore
        set_up("activemq", tmp_path / "b", hosts, **wishes)  # type: ignore[arg-type]


def test_a_directory_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ConfigError, match="is not empty"):
        set_up("activemq", tmp_path, [host_logins("anna", 1)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_given_certificates_are_taken(tmp_path: Path) -> None:
    made = set_up("activemq", tmp_path / "a", [host_logins("anna", 1)], names=["broker.example"], tls=True)
    given = GivenCertificate(made.ca, made.server_certificate, made.server_key)
    plan = set_up("rabbitmq", tmp_path / "b", [host_logins("anna", 1)], names=["broker.example"], given=given)
    assert plan.ca.read_bytes() == made.ca.read_bytes()
    assert stat.S_IMODE(plan.server_key.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="cannot be read"):
        set_up(
            "rabbitmq",
            tmp_path / "c",
            [host_logins("anna", 1)],
            given=GivenCertificate(tmp_path / "no", *[made.ca] * 2),
        )


GOOD = """\
format = 1
kind = "activemq"
brokers = ["127.0.0.1:1", "localhost:2", "[::1]:3"]
host = "anna"
passcode = "p"
[guests]
anna-g1 = "q"
"""


def written(folder: Path, text: str, mode: int = 0o600) -> Path:
    file = folder / "anna.toml"
    file.write_text(text)
    file.chmod(mode)
    return file


def test_settings_are_read(tmp_path: Path) -> None:
    settings = BrokerSettings.load(written(tmp_path, GOOD))
    assert [str(broker) for broker in settings.brokers] == ["127.0.0.1:1", "localhost:2", "[::1]:3"]
    assert "'q'" not in repr(settings) and "'p'" not in repr(settings)
    (tmp_path / "pass").write_text("from a file\n")
    text = GOOD.replace('passcode = "p"', 'passcode_file = "pass"')
    assert BrokerSettings.load(written(tmp_path, text)).host.passcode == "from a file"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("format = 1", "format = 9"), "format 9"),
        (('kind = "activemq"', 'kind = "coilmq"'), "kind 'coilmq'"),
        (('host = "anna"', 'host = "an na"'), "is not a login"),
        (('host = "anna"', ""), "'host' is missing"),
        (('passcode = "p"', ""), "'passcode_file' is missing"),
        (('passcode = "p"', 'passcode = ""'), "passcode is not a text"),
        (('"127.0.0.1:1"', '"127.0.0.1"'), "is not HOST:PORT"),
        (('"127.0.0.1:1"', '"192.0.2.7:1"'), "have no \\[tls\\]"),
        (('"127.0.0.1:1", "localhost:2", "[::1]:3"', ""), "name no broker"),
        (('passcode = "p"', 'passcode = "p"\ncolour = "red"'), "unknown key 'colour'"),
        (("[guests]", '[tls]\nca = "no.pem"\n[guests]'), "cannot be read"),
        (("[guests]", '[tls]\nca = "anna.toml"\n[guests]'), "is not a PEM certificate"),
        (("[guests]", "[guests"), "are not TOML"),
        (('anna-g1 = "q"', "anna-g1 = 3"), "passcode is not a text"),
    ],
)
def test_what_is_wrong_with_settings_is_one_sentence(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(ConfigError, match=words) as found:
        BrokerSettings.load(written(tmp_path, GOOD.replace(*change, 1)))
    assert ("\n" not in str(found.value) and "anna.toml" in str(found.value)) or "PEM" in str(found.value)


def test_settings_that_others_can_read_are_refused(tmp_path: Path) -> None:
    for mode in (0o640, 0o604, 0o620):
        with pytest.raises(ConfigError, match="others may read") as found:
            BrokerSettings.load(written(tmp_path, GOOD, mode))
        assert found.value.hint.startswith("chmod 600")


def test_a_plain_connection_to_another_machine_must_be_asked_for(tmp_path: Path) -> None:
    text = GOOD.replace('"127.0.0.1:1"', '"192.0.2.7:1"').replace("format = 1", "format = 1\nallow_plain = true")
    assert BrokerSettings.load(written(tmp_path, text)).brokers[0].host == "192.0.2.7"


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "b"
    command = ["broker", "init", "activemq", "--directory", str(folder), "--host-id", "anna", "--listen", "127.0.0.1:1"]
    assert main([*command, "--tls", "--name", "localhost", "--guests", "2"]) == 0
    assert f"vmctl broker check {folder}/anna.toml" in capsys.readouterr().out
    assert main(["broker", "check", str(folder / "anna.toml")]) == 1
    assert "WRONG the broker at localhost:1 cannot be reached: connection refused" in capsys.readouterr().out
    assert main(command) == 1
    assert "is not empty" in capsys.readouterr().err
    assert main([*command, "--ca", "x"]) == 1
    assert "go together" in capsys.readouterr().err
