"""A real Prometheus scrapes the monitor; every query of the dashboard and of the alerts finds what it asks for."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.brokers import free_port
from tests.system.agent_process import AgentProcess

from .conftest import DEADLINE, ROOT, MonitorProcess

FOLDER = ROOT / "examples" / "prometheus"
# Of these there is nothing when nothing has gone wrong.
ONLY_WITH_TROUBLE = {
    "vmwrapper_broker_losses_total",
    "vmwrapper_checkpoint_failures_total",
    "vmwrapper_refused_messages_total",
    "vmwrapper_vm_crashes_total",
    "vmwrapper_checkpoint_duration_seconds_bucket",  # process guests have no snapshots
}


@attrs.define
class Prometheus:
    port: int

    def get(self, path: str, **query: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=DEADLINE) as answer:
            return json.loads(answer.read())["data"]


@pytest.fixture
def prometheus(tmp_path: Path, monitor: MonitorProcess) -> Iterator[Prometheus]:
    target = monitor.site.split("/")[2]
    text = (FOLDER / "prometheus.yml").read_text().replace("127.0.0.1:8640", target).replace("15s", "1s")
    (tmp_path / "prometheus.yml").write_text(text)
    (tmp_path / "alerts.yml").write_text((FOLDER / "alerts.yml").read_text())
    port = free_port()
    argv = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    argv.append(f"--web.listen-address=127.0.0.1:{port}")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        yield Prometheus(port)
    finally:
        process.terminate()
        process.wait(DEADLINE)


@pytest.mark.parametrize(
    "command",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")],
)
def test_promtool_accepts_what_is_in_the_repository(command: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *command], cwd=FOLDER, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr


def through_grafanas_own_models(dashboard: dict[str, Any]) -> Any:
    """Read and written by the classes that are generated from Grafana's schemas: what they do not know is gone."""
    register_default_plugins()
    return json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))


def lost(before: Any, after: Any, path: str = "") -> list[str]:
    """Where `before` has what `after` has not."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [each for key in before for each in lost(before[key], after.get(key), f"{path}/{key}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [each for number, pair in pairs for each in lost(*pair, f"{path}/{number}")]
    return [] if before == after else [path]


def test_the_dashboard_is_one_by_grafanas_schema() -> None:
    dashboard = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    assert lost(dashboard, through_grafanas_own_models(dashboard)) == []
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and all(x < 24 for x, _ in cells), panel["title"]
        taken |= cells
    # And what is none is found.
    panels[0]["no_such_field"] = panels[1]["targets"][0]["no_such_field"] = 1
    assert len(lost(dashboard, through_grafanas_own_models(dashboard))) == 2


def test_every_alert_says_what_to_do() -> None:
    text = (FOLDER / "alerts.yml").read_text()
    assert text.count("- alert:") == text.count("todo:") == text.count("summary:") == text.count("severity:")


def test_a_real_scrape_has_all_that_is_asked_for(
    agent: AgentProcess, box: Path, monitor: MonitorProcess, prometheus: Prometheus
) -> None:
    agent.call("run", vm="box", argv=["sh", "-c", "exit 3"])
    agent.call("put", vm="box", source=str(Path(__file__)), destination="file")
    deadline = time.monotonic() + DEADLINE
    names: set[str] = set()
    while True:
        try:
            names = set(prometheus.get("label/__name__/values"))
            if "vmwrapper_copied_bytes_total" in names and "vmwrapper_vms" in names:
                break
        except OSError:
            pass  # it has just been started
        assert time.monotonic() < deadline, names
        time.sleep(0.3)  # a scrape is no event that could be awaited
    targets = prometheus.get("targets")["activeTargets"]
    assert [(target["health"], target["lastError"]) for target in targets] == [("up", "")]
    used = set()
    dashboard = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    for expression in [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]:
        filled = expression.replace("$host", ".*").replace("$__rate_interval", "1m")
        prometheus.get("query", query=filled)  # 400 for what is no query
        used |= set(re.findall(r"vmwrapper_\w+", expression))
    used |= set(re.findall(r"vmwrapper_\w+", (FOLDER / "alerts.yml").read_text()))
    assert used - names == ONLY_WITH_TROUBLE & used
    rules = prometheus.get("rules")["groups"][0]["rules"]
    assert len(rules) == (FOLDER / "alerts.yml").read_text().count("- alert:")
    assert [rule for rule in rules if rule["health"] == "err"] == []
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=monitor.metrics(), text=True, capture_output=True, timeout=DEADLINE
    )
    assert (checked.returncode, checked.stderr) == (0, "")
