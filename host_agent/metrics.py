"""Prometheus metrics of one or more host agents, by Prometheus's conventions for names and units.

Counters and histograms grow with the events of `events.py`; gauges are set from what the calls of `observe.py` say.
The host agent makes them of itself (`--metrics`), the monitor of all host agents that it sees.
"""

from __future__ import annotations

from collections import Counter as Tally
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .events import Happened

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OUTCOMES = ("exited", "signalled", "not_started", "deadline", "lost")
VM_STATES = ("defined", "starting", "running", "paused", "saved", "stopped", "crashed", "destroyed")
AGENT_STATES = ("waiting", "present", "silent", "gone")
QUEUE_KINDS = ("host", "guest", "presence", "dead_letter", "other")
LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
DURATION = (0.01, 0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)
CHECKPOINT = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """All metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry(auto_describe=True)
        host = ("host",)
        self._commands = Counter(
            "vmwrapper_commands", "Commands that have ended, by outcome.", (*host, "outcome"), registry=registry
        )
        self._failures = Counter(
            "vmwrapper_command_failures", "Commands that exited with another code than 0.", host, registry=registry
        )
        self._duration = Histogram(
            "vmwrapper_command_duration_seconds", "Run time of commands.", host, buckets=DURATION, registry=registry
        )
        self._latency = Histogram(
            "vmwrapper_command_start_latency_seconds",
            "From asking for a command until its guest says that it runs.",
            host,
            buckets=LATENCY,
            registry=registry,
        )
        self._command_cpu = Counter(
            "vmwrapper_command_cpu_seconds", "CPU time of commands that have ended.", host, registry=registry
        )
        self._copies = Counter(
            "vmwrapper_copies", "Copies that have ended.", (*host, "direction", "outcome"), registry=registry
        )
        self._copied = Counter(
            "vmwrapper_copied_bytes", "Bytes of copies that succeeded.", (*host, "direction"), registry=registry
        )
        self._checkpoints = Histogram(
            "vmwrapper_checkpoint_duration_seconds",
            "Time that saving, snapshotting and restoring VMs took.",
            (*host, "action"),
            buckets=CHECKPOINT,
            registry=registry,
        )
        self._checkpoint_failures = Counter(
            "vmwrapper_checkpoint_failures", "Checkpoints that failed.", (*host, "action"), registry=registry
        )
        self._broker_connects = Counter(
            "vmwrapper_broker_connects", "Connections of a host agent to its broker.", host, registry=registry
        )
        self._broker_losses = Counter(
            "vmwrapper_broker_losses", "Connections to the broker that were lost.", host, registry=registry
        )
        self._sessions = Counter(
            "vmwrapper_guest_sessions", "Sessions that guests have opened, so also reconnections.", host,
            registry=registry,
        )  # fmt: skip
        self._refused = Counter(
            "vmwrapper_refused_messages", "Messages that were not understood.", host, registry=registry
        )
        self._crashes = Counter("vmwrapper_vm_crashes", "VMs that ended unexpectedly.", host, registry=registry)
        self._vm_cpu = Counter("vmwrapper_vm_cpu_seconds", "CPU time of VMs.", host, registry=registry)
        self._vms = Gauge("vmwrapper_vms", "VMs by state.", (*host, "state"), registry=registry)
        self._guests = Gauge("vmwrapper_guests", "Guests by their agent's state.", (*host, "state"), registry=registry)
        self._running = Gauge("vmwrapper_commands_running", "Commands that run now.", host, registry=registry)
        self._up = Gauge("vmwrapper_host_agent_up", "1: the host agent answers.", host, registry=registry)
        broker = ("broker", "kind")
        self._broker_up = Gauge("vmwrapper_broker_up", "1: the broker is reached.", broker, registry=registry)
        self._queue = Gauge(
            "vmwrapper_broker_queue_messages", "Messages in the broker's queues of a kind.", (*broker, "queues"),
            registry=registry,
        )  # fmt: skip
        self._broker_gauges = {
            field: Gauge(f"vmwrapper_broker_{name}", text, broker, registry=registry)
            for field, name, text in (
                ("connections", "connections", "Clients that are connected."),
                ("consumers", "consumers", "Subscriptions."),
                ("memory_bytes", "memory_bytes", "Memory that the broker uses."),
                ("memory_limit_bytes", "memory_limit_bytes", "Memory that the broker may use."),
                ("dead_letters", "dead_letters", "Dead letters."),
            )
        }
        self._cpu_seen: dict[str, float] = {}

    # -- events

    def event(self, host: str, event: dict[str, Any]) -> None:
        """Count one event of a host agent."""
        name = event.get("event")
        if name == Happened.COMMAND_ENDED:
            outcome = str(event.get("outcome"))
            self._commands.labels(host, outcome if outcome in OUTCOMES else "other").inc()
            if outcome == "exited" and event.get("exit_code"):
                self._failures.labels(host).inc()
            _observe(self._duration.labels(host), event.get("wall_s"))
            self._command_cpu.labels(host).inc(_amount(event.get("cpu_s")))
        elif name == Happened.COMMAND_STARTED:
            _observe(self._latency.labels(host), event.get("latency_s"))
        elif name == Happened.COPY_ENDED:
            direction = "in" if event.get("direction") == "in" else "out"
            failed = bool(event.get("failed"))
            self._copies.labels(host, direction, "failed" if failed else "copied").inc()
            if not failed:
                self._copied.labels(host, direction).inc(_amount(event.get("bytes")))
        elif name == Happened.CHECKPOINT:
            action = str(event.get("action"))
            if event.get("failed"):
                self._checkpoint_failures.labels(host, action).inc()
            else:
                _observe(self._checkpoints.labels(host, action), event.get("seconds"))
        elif name == Happened.VM_STATE and event.get("state") == "crashed":
            self._crashes.labels(host).inc()
        else:
            counter = self._simple.get(str(name))
            if counter is not None:
                counter.labels(host).inc()

    @property
    def _simple(self) -> dict[str, Counter]:
        return {
            Happened.BROKER_CONNECTED: self._broker_connects,
            Happened.BROKER_LOST: self._broker_losses,
            Happened.GUEST_SESSION: self._sessions,
            Happened.REFUSED: self._refused,
        }

    # -- states

    def host_up(self, host: str, up: bool) -> None:
        self._up.labels(host).set(up)

    def host_gone(self, host: str) -> None:
        """The host agent has ended: its gauges go, its counters stay."""
        for state in VM_STATES:
            self._vms.remove_by_labels({"host": host, "state": state})
        for state in AGENT_STATES:
            self._guests.remove_by_labels({"host": host, "state": state})
        for gauge in (self._running, self._up):
            gauge.remove_by_labels({"host": host})

    def vms(self, host: str, vms: list[dict[str, Any]]) -> None:
        """The VM descriptions of a host agent, all of them."""
        states, agents = Tally(str(vm.get("state")) for vm in vms), Tally(str(vm.get("agent")) for vm in vms)
        for state in VM_STATES:
            self._vms.labels(host, state).set(states[state])
        for state in AGENT_STATES:
            self._guests.labels(host, state).set(agents[state])
        self._running.labels(host).set(sum(_amount(vm.get("commands")) for vm in vms))
        used = 0.0
        seen: dict[str, float] = {}
        prefix = f"{host} "
        for vm in vms:
            key = prefix + str(vm.get("instance"))
            cpu = _amount(vm.get("cpu_s"))
            # A VM that was saved and came back counts from 0 again.
            before = self._cpu_seen.get(key, 0.0)
            used += cpu - before if cpu >= before else cpu
            seen[key] = cpu
        self._cpu_seen = {key: cpu for key, cpu in self._cpu_seen.items() if not key.startswith(prefix)} | seen
        self._vm_cpu.labels(host).inc(used)

    def broker(self, broker: str, report: dict[str, Any]) -> None:
        """A broker's report. What it does not tell is no series, rather than 0."""
        kind = str(report.get("kind"))
        self._broker_up.labels(broker, kind).set(not report.get("problem"))
        for field, gauge in self._broker_gauges.items():
            if report.get(field) is not None:
                gauge.labels(broker, kind).set(_amount(report.get(field)))
            else:
                gauge.remove_by_labels({"broker": broker, "kind": kind})
        depths: Tally[str] = Tally()
        known = False
        for queue in report.get("queues") or ():
            if queue.get("messages") is not None:
                known = True
                depths[kind_of_queue(str(queue.get("name")))] += queue["messages"]
        for queues in QUEUE_KINDS:
            if known:
                self._queue.labels(broker, kind, queues).set(depths[queues])
            else:
                self._queue.remove_by_labels({"broker": broker, "kind": kind, "queues": queues})

    def text(self) -> bytes:
        """What Prometheus scrapes."""
        return generate_latest(self.registry)


def kind_of_queue(name: str) -> str:
    """What a queue is for, by its name."""
    bare = name.rpartition("/")[2]
    for prefix, kind in (
        ("vmwrapper.host.", "host"),
        ("vmwrapper.guest.", "guest"),
        ("vmwrapper.presence", "presence"),
    ):
        if bare.startswith(prefix):
            return kind
    return "dead_letter" if "DLQ" in bare or "dead" in bare.lower() else "other"


def _amount(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and value > 0 else 0.0


def _observe(histogram: Histogram, value: Any) -> None:
    if isinstance(value, (int, float)) and value >= 0:
        histogram.observe(value)
