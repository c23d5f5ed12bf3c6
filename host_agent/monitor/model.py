"""All that the monitor knows: rows for hosts, guests, commands, copies, checkpoints and brokers, events, and series.

Whatever is told of a host (`hosts.py`) comes in here, and what has changed goes out (`stream.py`). What guests and
brokers say is text for people: nothing here trusts it, and the page shows it as text.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Container
from typing import Any

from common.messages import Beacon
from host_agent.broker.report import BrokerReport
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
BROKER = "broker"  # what is asked or heard of the broker itself, not through a host agent


class Model:
    """`clock` is wall-clock time in seconds."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.hosts = Table(2000)
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
        self._readers: dict[str, int] = {}  # of host agents' queues, as their external broker counts them

    # -- hosts

    def host(self, host: str, info: dict[str, Any], via: str = "", clock_off_s: float = 0.0) -> None:
        """A host agent answers, or is heard `via` a broker. `clock_off_s`: how far its clock is behind ours."""
        row: Row = {"host": host, "via": via, "problem": "", "remedy": "", "kind": "agent", **_only(info, _HOST_FIELDS)}
        for field in ("agent_cpu_s", "load"):
            row[field] = None if row[field] is None else round(row[field], 1)
        row["clock_off_s"] = round(clock_off_s) if abs(clock_off_s) > trouble.CLOCK_OFF else 0
        self.hosts.set(host, trouble.mark(row, trouble.of_host(row)))

    def host_lost(self, host: str, problem: str, remedy: str = "") -> None:
        """It does not answer; what it had is shown as it was."""
        row = self.hosts.get(host) or {"host": host, "via": "", "kind": "agent", **dict.fromkeys(_HOST_FIELDS)}
        row = {**row, "clock_off_s": 0, "problem": problem[:300], "remedy": remedy}
        self.hosts.set(host, trouble.mark(row, trouble.of_host(row)))

    def host_silent(self, host: str, seconds: float, alive: Container[str]) -> None:
        """It is heard no more through its broker. `alive`: guests of it that still are."""
        guests = [row["instance"] for key in self.guests.of_host(host) if (row := self.guests.get(key)) is not None]
        still = sum(guest in alive for guest in guests)
        self.host_lost(host, *trouble.why_silent(seconds, still, self._readers.get(host)))
        for guest in guests:
            if guest not in alive:
                self.guest_silent(host, guest, f"its host agent {host} is silent")

    def host_gone(self, host: str) -> None:
        """It has ended in order: nothing of it is left."""
        self.hosts.drop(host)
        for table in (self.guests, self.commands, self.copies, self.brokers):
            table.keep_only(host, ())

    # -- guests

    def vms(self, host: str, vms: list[dict[str, Any]], via: str = "") -> None:
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
                "via": via,
                **{name: vm.get(name) for name in _VM_FIELDS},
                "reason": str(vm.get("reason") or ""),
                "cpu": self._cpu_percent(key, now, vm.get("cpu_s")),
                "seen": None if seen is None else float(round(now - seen)),
                "since": before["since"] if before and before["state"] == vm.get("state") else now,
            }
            if before is not None and row["seen"] is not None and abs((before["seen"] or 0) - row["seen"]) <= 1:
                row["seen"] = before["seen"]  # the rounding of two clocks is no news
            self.guests.set(key, trouble.mark(row, trouble.of_guest(row, now)))
        for key in self.guests.keep_only(host, keys):
            self._cpu.pop(key, None)

    def beacon(self, beacon: Beacon, via: str, *, stranger: bool, room: bool) -> bool:
        """A guest was heard. `stranger`: no host agent tells of it now, so the beacon is all there is to show, if there
        is `room`; returns whether it is shown."""
        now = self.clock()
        host = beacon.host or "?"
        key = f"{host} {beacon.guest}"
        row = self.guests.get(key)
        if row is None and not (stranger and room):
            return False
        told: Row = {"load": beacon.load, "memory_used_bytes": beacon.memory_bytes, "seen": float(round(now))}
        if row is None or stranger:
            told.update(
                commands=beacon.commands,
                cpu=self._cpu_percent(f"beacon {key}", now, beacon.cpu_s),
                agent_version=beacon.agent_version,
                cpus=beacon.cpus or None,
                memory_mb=round(beacon.memory_total_bytes / 2**20) or None,
                agent="present",
                because="",
            )
            self._beacon_commands(host, beacon, via, now)
        if row is None:
            own = {"vm": beacon.name or beacon.guest, "instance": beacon.guest, "state": "running"}
            row = {"host": host, "via": via, **dict.fromkeys(_VM_FIELDS), **own, "reason": "", "since": now}
        row = {**row, **told}
        self.guests.set(key, trouble.mark(row, trouble.of_guest(row, now)))
        return True

    def _beacon_commands(self, host: str, beacon: Beacon, via: str, now: float) -> None:
        """What runs in a guest by its own word; of its host agent's last word, its end is missing."""
        for command, seconds in beacon.running.items():
            key = f"{host} {command}"
            if key not in self.commands.rows:
                row = _unknown_command(host, command, beacon.name or beacon.guest, via)
                self._set_command(key, {**row, "state": "running", "by": beacon.guest, "started": now - seconds}, now)
        if len(beacon.running) == beacon.commands:  # it has told all
            for key in self.commands.of_host(host):
                row = self.commands.rows[key]
                if row.get("by") == beacon.guest and row["command"] not in beacon.running:
                    self.commands.drop(key)

    def guest_silent(self, host: str, guest: str, because: str = "") -> None:
        """It is heard no more through its broker."""
        row = self.guests.get(f"{host} {guest}")
        if row is not None and (row["agent"] == "present" or row.get("because", "") != because):
            self._patch_guest(f"{host} {guest}", agent="silent", because=because)

    def guest_gone(self, host: str, guest: str) -> None:
        """It has not been heard for so long that nobody waits for it."""
        self.guests.drop(f"{host} {guest}")

    def _cpu_percent(self, key: str, now: float, cpu_s: Any) -> int | None:
        if not isinstance(cpu_s, (int, float)):
            return None
        then, before = self._cpu.get(key, (now, cpu_s))
        self._cpu[key] = (now, cpu_s)
        return round(100 * max(0.0, cpu_s - before) / (now - then)) if now > then else None

    # -- commands and copies

    def commands_of(self, host: str, commands: list[dict[str, Any]], via: str = "") -> None:
        now = self.clock()
        keys = []
        for each in commands:
            key = f"{host} {each.get('command')}"
            keys.append(key)
            argv = str(each.get("argv") or "")
            row = {
                "host": host,
                "via": via,
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

    def copies_of(self, host: str, copies: list[dict[str, Any]], via: str = "") -> None:
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
                "via": via,
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
        key = f"{host} {report.get('name')}"
        before = self.brokers.get(key) or {}
        row.update({field: before.get(field, "") for field in ("beacons", "deaf")})
        for queue in report.get("queues") or ():
            name = str(queue.get("name"))
            if name.startswith(_HOST_QUEUE) and queue.get("consumers") is not None:
                self._readers[name.removeprefix(_HOST_QUEUE)] = queue["consumers"]
        self.brokers.set(key, trouble.mark(row, trouble.of_broker(row)))

    def listening(self, name: str, kind: str, connected: bool, problem: str) -> None:
        """Whether guests and hosts are heard through a broker."""
        key = f"{BROKER} {name}"
        row = self.brokers.get(key) or {"host": BROKER, **BrokerReport(kind, name).to_json(), "more_queues": 0}
        row = {**row, "beacons": "heard" if connected else "not heard", "deaf": problem[:300]}
        self.brokers.set(key, trouble.mark(row, trouble.of_broker(row)))

    @property
    def depth(self) -> int | None:
        """Messages in all brokers; None: no broker tells."""
        known = [row["messages"] for _, row in self.brokers if row.get("messages") is not None]
        return sum(known) if known else None

    # -- events

    def event(self, host: str, event: dict[str, Any], via: str = "") -> None:
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
            self.checkpoint(host, event)
        elif event.get("command"):
            self._command_event(host, str(name), event, via)

    def _patch_guest(self, key: str, **values: Any) -> None:
        row = self.guests.get(key)
        if row is not None:
            now = self.clock()
            row = {**row, **values, "since": now}
            self.guests.set(key, trouble.mark(row, trouble.of_guest(row, now)))

    def checkpoint(self, host: str, event: dict[str, Any]) -> None:
        row = {"host": host, **{name: event.get(name) for name in _CHECKPOINT_FIELDS}}
        key = f"{host} {event.get('instance')} {event.get('time')}"
        while len(self.checkpoints) >= MOST_CHECKPOINTS and key not in self.checkpoints.rows:
            self.checkpoints.drop(next(iter(self.checkpoints.rows)))
        self.checkpoints.set(key, trouble.mark(row, trouble.of_checkpoint(row)))

    def _command_event(self, host: str, name: str, event: dict[str, Any], via: str) -> None:
        key = f"{host} {event['command']}"
        row = self.commands.get(key)
        when = event.get("time")
        if row is None:
            program = str(event.get("program") or "?")
            row = {
                **_unknown_command(host, event["command"], str(event.get("vm") or ""), via),
                "program": program.rpartition("/")[2],
                "argv": program,
                "asked": when,
                "deadline": event.get("deadline_s"),
            }
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


_HOST_QUEUE = "vmwrapper.host."
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


def _unknown_command(host: str, command: str, vm: str, via: str) -> Row:
    return {
        "host": host, "via": via, **dict.fromkeys(_COMMAND_FIELDS), "vm": vm, "command": command, "program": "?",
        "argv": "?", "state": "asked", "outcome": "", "asked": None, "started": None, "ended": None, "deadline": None,
        "stdout_bytes": 0, "stderr_bytes": 0, "reason": "", "signal": "",
    }  # fmt: skip


def _only(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: values.get(name) for name in names}
