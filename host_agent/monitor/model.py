"""All that the monitor knows: rows for hosts, guests, commands, copies, checkpoints and brokers, events, and series.

Whatever is told of a host (`hosts.py`) comes in here, and what has changed goes out (`stream.py`). What guests and
brokers say is text for people: nothing here trusts it, and the page shows it as text.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from host_agent.events import Happened

from . import trouble
from .series import Series
from .table import Row, Table

MOST_GUESTS = 5000
MOST_COMMANDS = 5000
MOST_EVENTS = 2000
MOST_FRESH = 400  # events between two looks; more are counted, not sent
MOST_CHECKPOINTS = 300
MOST_PROGRAMS = 500
RUN_TIMES = 30  # of a program, from which its usual run time is taken
MOST_TROUBLES = 100


class Model:
    """`clock` is wall-clock time in seconds."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.hosts = Table(200)
        self.guests = Table(MOST_GUESTS)
        self.commands = Table(MOST_COMMANDS)
        self.copies = Table(MOST_COMMANDS)
        self.checkpoints = Table(MOST_CHECKPOINTS + 1)
        self.brokers = Table(200)
        self.tables = {
            "hosts": self.hosts,
            "guests": self.guests,
            "commands": self.commands,
            "copies": self.copies,
            "checkpoints": self.checkpoints,
            "brokers": self.brokers,
        }
        self.series = Series()
        self.events: deque[Row] = deque(maxlen=MOST_EVENTS)
        self._fresh: list[Row] = []
        self._skipped = 0
        self._run_times: dict[str, deque[float]] = {}
        self._cpu: dict[str, tuple[float, float]] = {}

    # -- hosts

    def host(self, host: str, info: dict[str, Any]) -> None:
        """A host agent answers."""
        row = {"host": host, "problem": "", "kind": "agent", **_only(info, _HOST_FIELDS)}
        for field in ("agent_cpu_s", "load"):
            row[field] = None if row[field] is None else round(row[field], 1)
        self.hosts.set(host, trouble.mark(row, None))

    def host_lost(self, host: str, problem: str) -> None:
        """It does not answer; what it had is shown as it was."""
        row = self.hosts.get(host) or {"host": host, "kind": "agent", **dict.fromkeys(_HOST_FIELDS)}
        row = {**row, "problem": problem[:300]}
        self.hosts.set(host, trouble.mark(row, trouble.of_host(row)))

    def host_gone(self, host: str) -> None:
        """It has ended in order: nothing of it is left."""
        self.hosts.drop(host)
        for table in (self.guests, self.commands, self.copies, self.brokers):
            table.keep_only(host, ())

    # -- guests

    def vms(self, host: str, vms: list[dict[str, Any]]) -> None:
        """All VMs of a host agent."""
        now = self.clock()
        keys = []
        for vm in vms:
            key = f"{host} {vm.get('instance')}"
            keys.append(key)
            before = self.guests.get(key)
            seen = vm.get("last_seen_s")
            row: Row = {
                "host": host,
                **{name: vm.get(name) for name in _VM_FIELDS},
                "reason": str(vm.get("reason") or ""),
                "cpu": self._cpu_percent(key, now, vm.get("cpu_s")),
                "seen": None if seen is None else float(round(now - seen)),
                "since": before["since"] if before and before["state"] == vm.get("state") else now,
            }
            if before is not None and row["seen"] is not None and abs((before["seen"] or 0) - row["seen"]) <= 1:
                row["seen"] = before["seen"]  # the rounding of two clocks is no news
            self.guests.set(key, trouble.mark(row, trouble.of_guest(row, now)))
        self.guests.keep_only(host, keys)
        kept = set(keys)
        self._cpu = {key: seen for key, seen in self._cpu.items() if key in kept or not key.startswith(f"{host} ")}

    def _cpu_percent(self, key: str, now: float, cpu_s: Any) -> int | None:
        if not isinstance(cpu_s, (int, float)):
            return None
        then, before = self._cpu.get(key, (now, cpu_s))
        self._cpu[key] = (now, cpu_s)
        return round(100 * max(0.0, cpu_s - before) / (now - then)) if now > then else None

    # -- commands and copies

    def commands_of(self, host: str, commands: list[dict[str, Any]]) -> None:
        now = self.clock()
        keys = []
        for each in commands:
            key = f"{host} {each.get('command')}"
            keys.append(key)
            argv = str(each.get("argv") or "")
            row = {
                "host": host,
                **{name: each.get(name) for name in _COMMAND_FIELDS},
                "program": argv.partition(" ")[0].rpartition("/")[2] or "?",
                "argv": argv,
                "asked": each.get("asked_at"),
                "started": each.get("started_at"),
                "ended": each.get("ended_at"),
                "deadline": each.get("deadline_s"),
            }
            self._set_command(key, row, now)
        self.commands.keep_only(host, keys)

    def _set_command(self, key: str, row: Row, now: float) -> None:
        self.commands.set(key, trouble.mark(row, trouble.of_command(row, now, self._usual(row["program"]))))

    def _usual(self, program: str) -> float | None:
        times = self._run_times.get(program)
        return statistics.median(times) if times is not None and len(times) >= 3 else None

    def copies_of(self, host: str, copies: list[dict[str, Any]]) -> None:
        now = self.clock()
        keys = []
        for each in copies:
            key = f"{host} {each.get('copy')}"
            keys.append(key)
            before = self.copies.get(key)
            done = int(each.get("bytes") or 0)
            moved = before["moved"] if before and before["bytes"] == done else now
            rate = None
            if before is not None and each.get("ended_at") is None:
                past = now - before["looked"]
                rate = round((done - before["bytes"]) / past) if past > 0 else before["rate"]
            if before is None or before["ended"] is None:
                self.series.copied(done - (before["bytes"] if before else 0 if each.get("ended_at") is None else done))
            row = {
                "host": host,
                **{name: each.get(name) for name in _COPY_FIELDS},
                "path": str(each.get("guest_path") or ""),
                "bytes": done,
                "total": each.get("total_bytes"),
                "asked": each.get("asked_at"),
                "ended": each.get("ended_at"),
                "rate": rate,
                "moved": moved,
                "looked": now if each.get("ended_at") is None else each.get("ended_at"),
            }
            self.copies.set(key, trouble.mark(row, trouble.of_copy(row, now)))
        self.copies.keep_only(host, keys)

    # -- brokers

    def broker(self, host: str, report: dict[str, Any]) -> None:
        """`host`: who told it."""
        row = {"host": host, **report}
        row["queues"] = [dict(queue) for queue in report.get("queues") or ()][:100]
        row["more_queues"] = max(0, len(report.get("queues") or ()) - 100)
        self.brokers.set(f"{host} {report.get('name')}", trouble.mark(row, trouble.of_broker(row)))

    @property
    def depth(self) -> int | None:
        """Messages in all brokers; None: no broker tells."""
        known = [row["messages"] for _, row in self.brokers if row.get("messages") is not None]
        return sum(known) if known else None

    # -- events

    def event(self, host: str, event: dict[str, Any]) -> None:
        """Show it, and what follows from it at once, before the next look at everything."""
        taken = {"host": host, **event}
        self.events.append(taken)
        if len(self._fresh) < MOST_FRESH:
            self._fresh.append(taken)
        else:
            self._skipped += 1
        self.series.event(event)
        name = event.get("event")
        guest = f"{host} {event.get('instance')}"
        if name == Happened.VM_STATE:
            self._patch_guest(guest, state=event.get("state"))
        elif name == Happened.GUEST_PRESENCE:
            self._patch_guest(guest, agent=event.get("presence"))
        elif name == Happened.CHECKPOINT:
            self._checkpoint(host, event)
        elif event.get("command"):
            self._command_event(host, str(name), event)

    def _patch_guest(self, key: str, **values: Any) -> None:
        row = self.guests.get(key)
        if row is not None:
            now = self.clock()
            row = {**row, **values, "since": now}
            self.guests.set(key, trouble.mark(row, trouble.of_guest(row, now)))

    def _checkpoint(self, host: str, event: dict[str, Any]) -> None:
        row = {"host": host, **{name: event.get(name) for name in _CHECKPOINT_FIELDS}}
        while len(self.checkpoints) >= MOST_CHECKPOINTS:
            self.checkpoints.drop(next(iter(self.checkpoints.rows)))
        key = f"{host} {event.get('instance')} {event.get('time')}"
        self.checkpoints.set(key, trouble.mark(row, trouble.of_checkpoint(row)))

    def _command_event(self, host: str, name: str, event: dict[str, Any]) -> None:
        key = f"{host} {event['command']}"
        row = self.commands.get(key)
        when = event.get("time")
        if row is None:
            program = str(event.get("program") or "?")
            row = {
                "host": host, **dict.fromkeys(_COMMAND_FIELDS), "vm": event.get("vm"), "command": event["command"],
                "program": program.rpartition("/")[2], "argv": program, "state": "asked", "outcome": "",
                "asked": when, "started": None, "ended": None, "deadline": event.get("deadline_s"),
                "stdout_bytes": 0, "stderr_bytes": 0, "reason": "", "signal": "",
            }  # fmt: skip
        if name == Happened.COMMAND_STARTED:
            row = {**row, "state": "running", "started": row["started"] or when}
        elif name == Happened.COMMAND_ENDED:
            for field in ("outcome", "exit_code", "signal", "reason", "wall_s", "cpu_s"):
                row = {**row, field: event.get(field)}
            row = {**row, "state": "ended", "ended": when}
            self._learn(row)
        self._set_command(key, row, self.clock())

    def _learn(self, row: Row) -> None:
        if row["outcome"] == "exited" and isinstance(row["wall_s"], (int, float)):
            if len(self._run_times) >= MOST_PROGRAMS and row["program"] not in self._run_times:
                return
            self._run_times.setdefault(row["program"], deque(maxlen=RUN_TIMES)).append(row["wall_s"])

    # -- looking

    def look(self) -> None:
        """What time alone makes wrong."""
        now = self.clock()
        for key, row in self.guests:
            self.guests.set(key, trouble.mark(row, trouble.of_guest(row, now)))
        for key, row in self.commands:
            if row["state"] != "ended" or row["level"] == trouble.RED:
                self._set_command(key, row, now)
        for key, row in self.copies:
            if row["ended"] is None:
                self.copies.set(key, trouble.mark(row, trouble.of_copy(row, now)))

    def troubles(self) -> list[Row]:
        """What is wrong, the worst first."""
        found = [
            {"table": name, "key": key, "level": row["level"], "what": row["what"], "todo": row["todo"]}
            for name, table in self.tables.items()
            for key, row in table.rows.items()
            if row["level"]
        ]
        found.sort(key=lambda each: each["level"] != trouble.RED)
        return found[:MOST_TROUBLES]

    def snapshot(self) -> dict[str, Any]:
        """Everything."""
        return {
            "tables": {name: dict(table.rows) for name, table in self.tables.items()},
            "events": list(self.events)[-MOST_FRESH:],
            "points": list(self.series.points),
            "troubles": self.troubles(),
            "now": self.clock(),
        }

    def changes(self) -> dict[str, Any]:
        """What has changed since the last call; empty when nothing has."""
        tables = {name: changed for name, table in self.tables.items() if (changed := table.changes())}
        fresh, self._fresh = self._fresh, []
        skipped, self._skipped = self._skipped, 0
        change: dict[str, Any] = {}
        if tables:
            change.update(tables=tables, troubles=self.troubles())
        if fresh:
            change.update(events=fresh, skipped=skipped)
        return change


_HOST_FIELDS = (
    "version", "pid", "started_at", "cpus", "load", "memory_bytes", "memory_available_bytes", "agent_cpu_s",
    "agent_rss_bytes",
)  # fmt: skip
_VM_FIELDS = (
    "vm", "instance", "state", "agent", "epoch", "hypervisor", "image", "memory_mb", "memory_used_bytes", "load",
    "cpus", "agent_version", "commands",
)  # fmt: skip
_COMMAND_FIELDS = (
    "vm", "command", "state", "cpu_s", "rss_bytes", "fraction", "wall_s", "outcome", "exit_code", "signal", "reason",
    "stdout_bytes", "stderr_bytes",
)  # fmt: skip
_COPY_FIELDS = ("vm", "copy", "direction", "failed", "reason")
_CHECKPOINT_FIELDS = ("vm", "instance", "time", "action", "snapshot", "seconds", "failed", "reason")


def _only(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: values.get(name) for name in names}
