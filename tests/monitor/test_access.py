"""Who may look and who may act: tokens, logins, TLS, requests of other sites."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from common.errors import ConfigError
from host_agent.broker.setup.certificates import make_authority, make_certificate
from host_agent.monitor.access import Login
from host_agent.monitor.serve import MonitorOptions
from tests.system.agent_process import AgentProcess

from .conftest import DEADLINE, MonitorProcess, monitor_process


def ask(
    monitor: MonitorProcess, path: str, method: str = "GET", body: Any = None, ca: Path | None = None, **headers: str
) -> tuple[int, dict[str, str], str]:
    """The answer's status, headers and body."""
    parts = urlsplit(monitor.url)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection = (
        http.client.HTTPConnection("127.0.0.1", parts.port, timeout=DEADLINE)
        if ca is None
        else http.client.HTTPSConnection(
            "127.0.0.1", parts.port, timeout=DEADLINE, context=ssl.create_default_context(cafile=str(ca))
        )
    )
    try:
        connection.request(method, path, None if body is None else json.dumps(body), named)
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        text = "" if path == "/stream" and answer.status == 200 else answer.read().decode()
        return answer.status, found, text
    finally:
        connection.close()


def cookie(monitor: MonitorProcess) -> str:
    status, headers, _ = ask(monitor, f"/?{urlsplit(monitor.url).query}")
    assert (status, headers["location"]) == (303, "/")
    assert "HttpOnly" in headers["set-cookie"] and "SameSite=Strict" in headers["set-cookie"]
    return headers["set-cookie"].partition(";")[0]


def test_without_the_token_nothing_is_seen(monitor: MonitorProcess) -> None:
    for path in ("/", "/stream", "/output?command=c", "/monitor.js", "/?token=wrong"):
        status, _, text = ask(monitor, path)
        assert (status, text) == (403, "Open the address with the token that vmctl monitor printed.\n")


def test_every_answer_forbids_what_the_page_does_not_need(monitor: MonitorProcess) -> None:
    status, headers, _ = ask(monitor, "/", Cookie=cookie(monitor))
    assert status == 200
    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    assert (headers["x-frame-options"], headers["x-content-type-options"]) == ("DENY", "nosniff")


def test_a_name_that_is_not_ours_is_refused(monitor: MonitorProcess) -> None:
    """Somebody lets a name of his point to 127.0.0.1, so that his page in our browser can read us."""
    for path in ("/", "/metrics", f"/?{urlsplit(monitor.url).query}"):
        assert ask(monitor, path, Host="evil.example:80")[0] == 421


def test_only_what_is_listed_is_served(monitor: MonitorProcess) -> None:
    for path in ("/../../etc/passwd", "/static/", "/%2e%2e/page.py", "/uplot/README.md", "/control/ping"):
        assert ask(monitor, path, Cookie=cookie(monitor))[0] == 404


def test_a_request_of_another_site_changes_nothing(monitor: MonitorProcess, agent: AgentProcess, box: Path) -> None:
    mine = cookie(monitor)
    site = monitor.site.rstrip("/")
    # The key stands in the stream, which another site cannot read.
    parts = urlsplit(monitor.url)
    connection = http.client.HTTPConnection("127.0.0.1", parts.port, timeout=DEADLINE)
    connection.request("GET", "/stream", headers={"Cookie": mine})
    stream = connection.getresponse()
    assert stream.readline() == b"event: state\n"
    state = json.loads(stream.readline().partition(b" ")[2])
    connection.close()
    good = {"Cookie": mine, "Origin": site, "Content_Type": "application/json", "X_VMwrapper_Key": state["key"]}
    (host,) = [path.stem for path in (agent.folder / "run" / "agents").glob("*.json")]
    body = {"host": host, "vm": "box"}
    for wrong in (
        {"Origin": "http://evil.example"},
        {"Origin": ""},
        {"X_VMwrapper_Key": "guessed"},
        {"Content_Type": "text/plain"},
        {"Sec_Fetch_Site": "cross-site"},
    ):
        status, _, text = ask(monitor, "/control/pause", "POST", body, **{**good, **wrong})
        assert (status, text) == (403, "This request does not come from the monitor's own page.\n")
    assert ask(monitor, "/control/pause", "POST", body, **{**good, "Cookie": ""})[0] == 403
    assert agent.call("vms")["vms"][0]["state"] == "running"
    assert ask(monitor, "/control/shutdown", "POST", body, **good)[0] == 404
    assert ask(monitor, "/control/pause", "POST", {"host": 7}, **good)[0] == 400
    assert ask(monitor, "/control/pause", "POST", {**body, "host": "h-other"}, **good)[0] == 502
    assert ask(monitor, "/control/pause", "POST", body, **good)[0] == 200
    assert agent.call("vms")["vms"][0]["state"] == "paused"


def test_a_monitor_that_only_looks_changes_nothing(folder: Path, agent: AgentProcess) -> None:
    with monitor_process(folder) as monitor:
        status, _, text = ask(monitor, "/control/pause", "POST", {}, Cookie=cookie(monitor))
        assert (status, text) == (403, "This monitor only looks: vmctl monitor --control lets it do more.\n")


def test_a_login_over_tls(tmp_path: Path) -> None:
    make_authority(tmp_path)
    make_certificate(tmp_path, ["127.0.0.1"])
    password = tmp_path / "password"
    password.write_text("correct horse\n")
    password.chmod(0o600)
    options = ["--login", "ops", "--password-file", str(password)]
    options += ["--certificate", str(tmp_path / "server.pem"), "--key", str(tmp_path / "server.key")]
    with monitor_process(tmp_path, *options) as monitor:
        ca = tmp_path / "ca.pem"
        assert monitor.url.startswith("https://") and "token" not in monitor.url
        for path in ("/", "/metrics", "/stream"):
            status, headers, _ = ask(monitor, path, ca=ca)
            assert (status, headers["www-authenticate"][:5]) == (401, "Basic")
        for wrong in ("ops:wrong", "other:correct horse", "ops:"):
            given = base64.b64encode(wrong.encode()).decode()
            assert ask(monitor, "/", ca=ca, Authorization=f"Basic {given}")[0] == 401
        right = base64.b64encode(b"ops:correct horse").decode()
        for path in ("/", "/metrics"):
            assert ask(monitor, path, ca=ca, Authorization=f"Basic {right}")[0] == 200
        old = subprocess.run(
            ["openssl", "s_client", "-connect", urlsplit(monitor.url).netloc, "-tls1_1"],
            input=b"", capture_output=True, timeout=DEADLINE,
        )  # fmt: skip
        assert old.returncode != 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (MonitorOptions(interface="0.0.0.0"), "can be reached from other machines"),
        (MonitorOptions(interface="0.0.0.0", login=Login("a", "b")), "needs a login and TLS"),
        (MonitorOptions(certificate=Path("x")), "go together"),
    ],
)
def test_others_may_not_look_without_a_login_and_tls(options: MonitorOptions, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        options.check()
