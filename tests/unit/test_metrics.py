"""Metrics are right, bounded, and pass Prometheus's own linter."""

from __future__ import annotations

import subprocess
import time
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from host_agent.events import Happened
from host_agent.metrics import Metrics


def values(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """By name and label values, in the order of the labels' names."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }


def vm(number: int, **more: Any) -> dict[str, Any]:
    return {"instance": f"g-{number}", "state": "running", "agent": "present", "cpu_s": 1.0, "commands": 1, **more}


def filled(guests: int = 3) -> Metrics:
    metrics = Metrics()
    for event in (
        {"event": Happened.COMMAND_STARTED, "latency_s": 0.02},
        {"event": Happened.COMMAND_ENDED, "outcome": "exited", "exit_code": 0, "wall_s": 3.0, "cpu_s": 2.5},
        {"event": Happened.COMMAND_ENDED, "outcome": "exited", "exit_code": 3, "wall_s": 1.0, "cpu_s": 0.5},
        {"event": Happened.COMMAND_ENDED, "outcome": "lost", "reason": "x"},
        {"event": Happened.COPY_ENDED, "direction": "in", "failed": False, "bytes": 1000},
        {"event": Happened.COPY_ENDED, "direction": "out", "failed": True, "bytes": 77},
        {"event": Happened.CHECKPOINT, "action": "snapshot", "failed": False, "seconds": 0.3},
        {"event": Happened.CHECKPOINT, "action": "save", "failed": True, "seconds": 9},
        {"event": Happened.BROKER_CONNECTED},
        {"event": Happened.BROKER_LOST},
        {"event": Happened.GUEST_SESSION},
        {"event": Happened.REFUSED},
        {"event": Happened.VM_STATE, "state": "crashed"},
        {"event": "something of a newer agent"},
    ):
        metrics.event("h", event)
    metrics.host_up("h", True)
    metrics.vms("h", [vm(number) for number in range(guests)])
    queues = [{"name": f"/queue/vmwrapper.guest.g-{n}", "messages": 2} for n in range(guests)]
    queues.append({"name": "/queue/vmwrapper.host.h", "messages": 5})
    metrics.broker("h", {"kind": "embedded", "problem": "", "connections": 4, "consumers": None, "queues": queues})
    return metrics


def test_what_has_happened_is_counted() -> None:
    found = values(filled())
    expected = {
        ("vmwrapper_commands_total", "h", "exited"): 2,
        ("vmwrapper_commands_total", "h", "lost"): 1,
        ("vmwrapper_command_failures_total", "h"): 1,
        ("vmwrapper_command_duration_seconds_sum", "h"): 4,
        ("vmwrapper_command_start_latency_seconds_count", "h"): 1,
        ("vmwrapper_command_start_latency_seconds_bucket", "h", "0.025"): 1,
        ("vmwrapper_command_start_latency_seconds_bucket", "h", "0.01"): 0,
        ("vmwrapper_command_cpu_seconds_total", "h"): 3,
        ("vmwrapper_copies_total", "in", "h", "copied"): 1,
        ("vmwrapper_copies_total", "out", "h", "failed"): 1,
        ("vmwrapper_copied_bytes_total", "in", "h"): 1000,
        ("vmwrapper_checkpoint_duration_seconds_count", "snapshot", "h"): 1,
        ("vmwrapper_checkpoint_failures_total", "save", "h"): 1,
        ("vmwrapper_broker_connects_total", "h"): 1,
        ("vmwrapper_broker_losses_total", "h"): 1,
        ("vmwrapper_guest_sessions_total", "h"): 1,
        ("vmwrapper_refused_messages_total", "h"): 1,
        ("vmwrapper_vm_crashes_total", "h"): 1,
        ("vmwrapper_vms", "h", "running"): 3,
        ("vmwrapper_vms", "h", "crashed"): 0,
        ("vmwrapper_guests", "h", "present"): 3,
        ("vmwrapper_commands_running", "h"): 3,
        ("vmwrapper_broker_connections", "h", "embedded"): 4,
        ("vmwrapper_broker_queue_messages", "h", "embedded", "guest"): 6,
        ("vmwrapper_broker_queue_messages", "h", "embedded", "host"): 5,
    }
    assert {key: found.get(key) for key in expected} == expected


def test_what_a_broker_cannot_tell_is_no_series() -> None:
    metrics = filled()
    assert "vmwrapper_broker_consumers{" not in metrics.text().decode()
    metrics.broker("h", {"kind": "embedded", "problem": "it is down", "queues": []})
    found = values(metrics)
    assert ("vmwrapper_broker_connections", "h", "embedded") not in found
    assert not any(key[0] == "vmwrapper_broker_queue_messages" for key in found)
    assert found["vmwrapper_broker_up", "h", "embedded"] == 0


def test_cpu_time_only_grows() -> None:
    metrics = Metrics()
    for cpu, total in ((2.0, 2.0), (5.0, 5.0), (1.0, 6.0), (1.5, 6.5)):  # the third: it was saved and came back
        metrics.vms("h", [vm(1, cpu_s=cpu)])
        assert values(metrics)["vmwrapper_vm_cpu_seconds_total", "h"] == total
    metrics.vms("h", [])
    assert values(metrics)["vmwrapper_vm_cpu_seconds_total", "h"] == 6.5


def test_of_a_host_that_is_gone_only_counters_stay() -> None:
    metrics = filled()
    metrics.host_gone("h")
    found = values(metrics)
    assert not {key[0] for key in found} & {"vmwrapper_vms", "vmwrapper_guests", "vmwrapper_host_agent_up"}
    assert found["vmwrapper_commands_total", "h", "lost"] == 1


def test_promtool_finds_nothing_to_complain_of() -> None:
    done = subprocess.run(["promtool", "check", "metrics"], input=filled().text(), capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("guests", [1000])
def test_a_scrape_of_a_thousand_guests_is_quick(guests: int) -> None:
    metrics = filled(guests)
    best = 10.0
    for _ in range(5):
        began = time.process_time()
        metrics.vms("h", [vm(number) for number in range(guests)])
        metrics.text()
        best = min(best, time.process_time() - began)
    assert best < 0.1
