"""What a host agent tells about itself, with real guests: events, lists, output, a command's story, metrics."""

from __future__ import annotations

import base64
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread

from common.errors import ConfigError
from host_agent.metrics_page import serve_metrics

from .conftest import DEADLINE, Laptop, ignore


async def call(laptop: Laptop, name: str, **args: Any) -> Any:
    handler = laptop.operations.handler(name)
    assert handler is not None
    answer = handler(args, ignore)
    return answer if isinstance(answer, dict) else await answer


@pytest_twisted.ensureDeferred
async def test_a_command_leaves_its_story(laptop: Laptop) -> None:
    # Its output shows that it was delivered, a moment before the guest says that it runs.
    result = await laptop.run("sh", "-c", "echo hello; echo oops >&2; sleep 0.2; exit 3", command="c-story")
    assert result["exit_code"] == 3
    batch = await call(laptop, "events", since=0)
    about = [event for event in batch["events"] if event.get("command") == "c-story"]
    names = [event["event"] for event in about]
    assert names[0] == "command_asked" and names[-1] == "command_ended"
    assert {"command_delivered", "command_started"} < set(names)
    assert all(event["vm"] == "lap" and event["instance"].startswith("g-") for event in about)
    assert [event["time"] for event in about] == sorted(event["time"] for event in about)
    assert about[-1]["outcome"] == "exited" and about[-1]["exit_code"] == 3
    assert next(event for event in about if event["event"] == "command_started")["latency_s"] > 0

    (command,) = (await call(laptop, "commands"))["commands"]
    assert (command["command"], command["vm"], command["state"], command["exit_code"]) == ("c-story", "lap", "ended", 3)
    assert command["argv"].startswith("sh -c echo hello")
    assert command["asked_at"] <= command["started_at"] <= command["ended_at"]

    output = await call(laptop, "output", command="c-story")
    assert base64.b64decode(output["stdout"]["data"]) == b"hello\n"
    assert base64.b64decode(output["stderr"]["data"]) == b"oops\n"
    rest = await call(laptop, "output", command="c-story", stdout_from=3)
    assert (base64.b64decode(rest["stdout"]["data"]), rest["stdout"]["offset"]) == (b"lo\n", 3)

    trace = await call(laptop, "trace", command="c-story")
    assert [event["event"] for event in trace["events"]] == names
    assert trace["about"]["vm"] == "lap"


@pytest_twisted.ensureDeferred
async def test_copies_are_listed_and_counted(laptop: Laptop) -> None:
    (laptop.host / "file").write_bytes(b"x" * 5000)
    await laptop.put(laptop.host / "file", "file")
    (copy,) = (await call(laptop, "copies"))["copies"]
    assert (copy["direction"], copy["bytes"], copy["failed"]) == ("in", 5000, False)
    ended = [e for e in (await call(laptop, "events", since=0))["events"] if e["event"] == "copy_ended"]
    assert (ended[0]["bytes"], ended[0]["copy"]) == (5000, copy["copy"])


@pytest_twisted.ensureDeferred
async def test_the_broker_and_the_host_say_how_they_do(laptop: Laptop) -> None:
    broker = await call(laptop, "broker")
    assert (broker["kind"], broker["problem"], broker["connections"]) == ("embedded", "", 1)
    assert any(queue["name"].startswith("/queue/vmwrapper.guest.") for queue in broker["queues"])
    host = await call(laptop, "host")
    assert host["cpus"] >= 1 and host["agent_rss_bytes"] > 1_000_000


@pytest_twisted.ensureDeferred
async def test_a_killed_guest_is_news_with_its_reason(laptop: Laptop) -> None:
    last = (await call(laptop, "events"))["last"]
    vm = laptop.agent._vms.get("lap")
    assert vm is not None and vm.machine is not None
    await vm.machine.power_off()
    states: list[Any] = []
    while not states:
        waiting: Deferred[Any] = Deferred.fromCoroutine(call(laptop, "events", since=last, wait_s=DEADLINE))
        batch = await waiting.addTimeout(2 * DEADLINE, reactor)
        assert batch["events"], "nothing was told"
        last = batch["last"]
        states += [event for event in batch["events"] if event["event"] == "vm_state"]
    assert (states[0]["vm"], states[0]["state"]) == ("lap", "stopped")
    assert (await call(laptop, "vms"))["vms"][0]["reason"] == "The VM lap was powered off by its guest"


@pytest_twisted.ensureDeferred
async def test_nonsense_of_a_guest_is_told(laptop: Laptop) -> None:
    laptop.agent.broker_message("/queue/vmwrapper.host.x", b"<script>alert(1)</script>")
    events = (await call(laptop, "events", since=0))["events"]
    assert [(e["event"], e["level"], e["reason"]) for e in events[-1:]] == [
        ("refused", "warn", "a message is not JSON")
    ]


@pytest_twisted.ensureDeferred
async def test_metrics_are_scraped(laptop: Laptop) -> None:
    port: Any = serve_metrics(reactor, "0", laptop.agent.id, laptop.agent.observation)
    try:
        await laptop.run("true")
        url = f"http://127.0.0.1:{port.getHost().port}/metrics"

        def scrape() -> str:
            with urllib.request.urlopen(url, timeout=DEADLINE) as answer:
                return str(answer.read().decode())

        text = await deferToThread(scrape)
        host = laptop.agent.id
        assert f'vmwrapper_commands_total{{host="{host}",outcome="exited"}} 1.0' in text
        assert f'vmwrapper_vms{{host="{host}",state="running"}} 1.0' in text
        assert f'vmwrapper_broker_connections{{broker="{host}",kind="embedded"}} 1.0' in text
        checked = subprocess.run(["promtool", "check", "metrics"], input=text, text=True, capture_output=True)
        assert (checked.returncode, checked.stderr) == (0, "")
    finally:
        await port.stopListening()


def test_metrics_without_a_login_stay_on_the_loopback(tmp_path: Path) -> None:
    nobody: Any = None
    with pytest.raises(ConfigError, match="can be reached from other machines"):
        serve_metrics(nobody, "0.0.0.0:9640", "h", nobody)
