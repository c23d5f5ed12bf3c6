"""What a host agent tells about itself: the calls of `docs/control.md` that change nothing.

The monitor, `vmctl top`, `vmctl trace` and the volunteer's page see a host agent through these.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil

from common.errors import VMwrapperError

from . import __version__
from .broker.report import BrokerReport
from .commands import Command, Commands, Update
from .copies import Copies, Copy
from .events import EventLog, Listener
from .streams import OutputStream
from .vms import VirtualMachines

MOST_LISTED = 1000  # commands or copies in one answer: those that have not ended first, then the newest
MOST_ARGV = 200  # characters of a command line
MOST_TAIL = 64 * 1024  # bytes of a stream in one answer
CONSOLE_LINES = 400

Calls = Mapping[str, Callable[[dict[str, Any], Update], Any]]


class NoCommand(VMwrapperError):
    """No command or copy has this id."""

    code = "no_command"


class Observation:
    """Looks into the parts of a host agent."""

    def __init__(
        self,
        vms: VirtualMachines,
        commands: Commands,
        copies: Copies,
        events: EventLog,
        broker: Callable[[], BrokerReport],
    ) -> None:
        self._vms = vms
        self._commands = commands
        self._copies = copies
        self._events = events
        self.broker_report = broker
        self._began = time.time()
        self.calls: Calls = {
            "host": self.host,
            "commands": self.commands,
            "copies": self.copies,
            "broker": self.broker,
            "events": self.events,
            "output": self.output,
            "trace": self.trace,
        }

    def listen(self, listener: Listener) -> None:
        """Tell of every event from now on."""
        self._events.listeners.append(listener)

    def all_vms(self) -> list[dict[str, Any]]:
        """Their descriptions."""
        return [self._vms.describe(vm) for vm in self._vms]

    def for_volunteer(self, most_commands: int, most_events: int) -> dict[str, Any]:
        """For the owner of this computer. A program's name is enough: its arguments are the project's."""
        commands = []
        for each in _choose(list(self._commands), lambda command: command.ended)[:most_commands]:
            described = _describe_command(each)
            names = ("vm", "state", "asked_at", "started_at", "fraction", "outcome")
            commands.append(
                {"program": each.run.argv[0].rpartition("/")[2], **{name: described[name] for name in names}}
            )
        newest = self._events.since(self._events.last - most_events)["events"]
        told = [{"time": event["time"], "text": event["text"]} for event in reversed(newest)]
        return {"now": time.time(), "vms": self.all_vms(), "commands": commands, "events": told}

    def host(self, args: dict[str, Any], update: Update) -> dict[str, Any]:
        memory = psutil.virtual_memory()
        process = psutil.Process()
        times = process.cpu_times()
        return {
            "version": __version__,
            "pid": process.pid,
            "started_at": self._began,
            "cpus": os.cpu_count() or 1,
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "memory_bytes": memory.total,
            "memory_available_bytes": memory.available,
            "agent_cpu_s": times.user + times.system,
            "agent_rss_bytes": process.memory_info().rss,
        }

    def commands(self, args: dict[str, Any], update: Update) -> dict[str, Any]:
        """All that run, and the newest of those that have ended."""
        chosen = _choose(list(self._commands), lambda command: command.ended)
        return {"commands": [_describe_command(command) for command in chosen]}

    def copies(self, args: dict[str, Any], update: Update) -> dict[str, Any]:
        chosen = _choose(list(self._copies), lambda copy: copy.result is not None)
        return {"copies": [_describe_copy(copy) for copy in chosen]}

    def broker(self, args: dict[str, Any], update: Update) -> dict[str, Any]:
        return self.broker_report().to_json()

    async def events(self, args: dict[str, Any], update: Update) -> dict[str, Any]:
        since, seconds = args.get("since", -1), args.get("wait_s", 0.0)
        if not isinstance(since, int) or not isinstance(seconds, (int, float)):
            raise VMwrapperError("since and wait_s must be numbers")
        return await self._events.wait(str(args.get("log", "")), since, seconds)

    def output(self, args: dict[str, Any], update: Update) -> dict[str, Any]:
        """The end of a command's output, from the offsets on that are asked for."""
        command = self._command(args)
        return {
            "command": command.id,
            **{name: _tail(stream, args.get(f"{name}_from")) for name, stream in command.streams.items()},
        }

    def trace(self, args: dict[str, Any], update: Update) -> dict[str, Any]:
        """All that is known of one command or copy: events, and what its guest's agent wrote of it on the console."""
        wanted = str(args.get("command", ""))
        command, copy = self._commands.get(wanted), self._copies.get(wanted)
        events = self._events.about("command", wanted) + self._events.about("copy", wanted)
        if command is None and copy is None and not events:
            raise NoCommand(f"This host agent knows nothing of {wanted[:64]}.", "vmctl top lists commands and copies")
        about: dict[str, Any] = {}
        if command is not None:
            about = _describe_command(command)
        elif copy is not None:
            about = _describe_copy(copy)
        name = str(about.get("vm") or (events[0].get("vm", "") if events else ""))
        return {"about": about, "events": events, "console": self._console(name, wanted)}

    def _console(self, vm_name: str, wanted: str) -> list[str]:
        vm = self._vms.get(vm_name)
        if vm is None or vm.machine is None:
            return []
        return [line for line in vm.machine.console_tail(CONSOLE_LINES).splitlines() if wanted in line]

    def _command(self, args: dict[str, Any]) -> Command:
        command = self._commands.get(str(args.get("command", "")))
        if command is None:
            raise NoCommand(f"No command has the id {str(args.get('command', ''))[:64]}.")
        return command


def _choose(items: list[Any], ended: Callable[[Any], bool]) -> list[Any]:
    open_ = [item for item in items if not ended(item)][:MOST_LISTED]
    room = MOST_LISTED - len(open_)
    return open_ + [item for item in items if ended(item)][-room:] if room else open_


def _describe_command(command: Command) -> dict[str, Any]:
    usage, result = command.usage, command.result
    argv = " ".join(command.run.argv)
    streams = command.streams
    return {
        **command.about,
        "state": command.state.value,
        "argv": argv if len(argv) <= MOST_ARGV else f"{argv[:MOST_ARGV]}…",
        "pid": command.pid,
        "asked_at": command.record.asked_at,
        "started_at": command.started_at,
        "ended_at": command.ended_at,
        "deadline_s": command.run.deadline_s,
        "cpu_s": result.user_s + result.system_s if result else usage.cpu_s if usage else None,
        "rss_bytes": result.max_rss_bytes if result else usage.rss_bytes if usage else None,
        "fraction": usage.fraction if usage else None,
        "wall_s": result.wall_s if result else None,
        "outcome": result.outcome if result else "",
        "exit_code": result.exit_code if result else None,
        "signal": result.signal if result else "",
        "reason": (result.reason if result else command.gap)[:MOST_ARGV],
        "stdout_bytes": streams["stdout"].have,
        "stderr_bytes": streams["stderr"].have,
    }


def _describe_copy(copy: Copy) -> dict[str, Any]:
    request, result = copy.record.request, copy.result
    return {
        **copy.about,
        "host_path": str(request["host"])[-MOST_ARGV:],
        "guest_path": str(request["guest_path"])[-MOST_ARGV:],
        "asked_at": copy.record.asked_at,
        "ended_at": copy.ended_at,
        "bytes": result.bytes if result else copy.done_bytes,
        "total_bytes": result.bytes if result else copy.total_bytes,
        "failed": bool(result and result.reason),
        "reason": (result.reason if result else "")[:MOST_ARGV],
    }


def _tail(stream: OutputStream, start: Any) -> dict[str, Any]:
    offset = start if isinstance(start, int) and start >= 0 else 0
    offset = max(offset, stream.have - MOST_TAIL)
    pieces = list(stream.replay(offset))
    data = b"".join(piece for _, piece in pieces)
    return {
        "offset": pieces[0][0] if pieces else offset,
        "data": base64.b64encode(data).decode("ascii"),
        "bytes": stream.have,
    }
