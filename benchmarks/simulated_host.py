"""A host agent without VMs: its control interface is the real one, what it tells is made up.

    python -m benchmarks.simulated_host --guests 1000 --rate 100 --seconds 60

For tests and measurements of whatever looks at host agents. It prints its endpoint as a host agent does.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import os
import random
import time
from typing import Any

from twisted.internet import reactor as default_reactor
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from host_agent import __version__
from host_agent.control import ControlServer, Endpoint
from host_agent.events import EventLog, Happened

COMMANDS_KEPT = 500
TICK = 0.05  # seconds


class SimulatedHost:
    """`guests` guests in which commands start and end: `rate` events a second."""

    def __init__(self, reactor: Any, agent: str, guests: int, rate: float, seed: int = 1, first: int = 0) -> None:
        """`first`: the number of its first guest."""
        self._random = random.Random(seed)  # noqa: S311  (made-up data)
        self._reactor = reactor
        self._rate = rate
        self.events = EventLog(reactor)
        self._log = Logger(observer=self.events)
        self.vms = [self._vm(number) for number in range(first, first + guests)]
        self.commands: dict[str, dict[str, Any]] = {}
        self.copies: list[dict[str, Any]] = []
        self.asked: list[tuple[str, dict[str, Any]]] = []  # what somebody wanted us to do
        self._numbers = itertools.count(1)
        self._running: list[str] = []
        self._owed = 0.0
        self._began = time.time()
        self.calls: dict[str, Any] = {
            "vms": self._vms,
            "commands": lambda args: {"commands": list(self.commands.values())},
            "copies": lambda args: {"copies": self.copies},
            "host": self._host,
            "broker": self._broker,
            "events": lambda args: self.events.wait(args.get("log", ""), args["since"], args["wait_s"]),
            "output": self._output,
            "ping": lambda args: self._asked("ping", args, {"round_trip_s": 0.012}),
            "signal": lambda args: self._asked("signal", args, {}),
            "pause_vm": lambda args: self._asked("pause_vm", args, {}),
            "resume_vm": lambda args: self._asked("resume_vm", args, {}),
        }
        self.control = ControlServer(reactor, agent, self)  # type: ignore[arg-type]
        self._ticking = LoopingCall(self._tick)
        self._ticking.clock = reactor

    def start(self) -> Endpoint:
        self.live()
        return self.control.listen()

    def live(self) -> None:
        """Let things happen."""
        self._ticking.start(TICK, now=False)

    def stop(self) -> Any:
        if self._ticking.running:
            self._ticking.stop()
        return self.control.stop()

    # -- what the control interface calls

    def handler(self, call: str) -> Any:
        answer = self.calls.get(call)
        if answer is None:
            return None

        async def answered(args: dict[str, Any], update: Any) -> Any:
            value = answer(args)
            return value if isinstance(value, dict) else await value

        return answered

    def _asked(self, call: str, args: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        self.asked.append((call, args))
        return answer

    def _vm(self, number: int) -> dict[str, Any]:
        return {
            "vm": f"worker-{number:04}", "instance": f"g-{number:016x}", "state": "running", "agent": "present",
            "hypervisor": "qemu", "image": "debian-minimal", "memory_mb": 256, "cpus": 1, "pid": 10_000 + number,
            "cpu_s": 0.0, "agent_version": __version__, "epoch": 1, "load": 0.5, "memory_used_bytes": 80_000_000,
            "last_seen_s": 0.0, "seen_at": time.time() + self._random.uniform(-10, 0), "commands": 0, "reason": "",
        }  # fmt: skip

    def _vms(self, args: dict[str, Any]) -> dict[str, Any]:
        now = time.time()
        for vm in self.vms:
            if vm["state"] == "running" and vm["agent"] == "present":
                vm["cpu_s"] = round((now - self._began) * 0.9, 2)
                if now - vm["seen_at"] > 10:  # a beacon came
                    vm["seen_at"] = now
                    vm["load"] = round(self._random.uniform(0, 1), 2)
            vm["last_seen_s"] = now - vm["seen_at"]
        return {"vms": self.vms}

    def _host(self, args: dict[str, Any]) -> dict[str, Any]:
        return {
            "version": __version__, "pid": os.getpid(), "started_at": self._began, "cpus": 8, "load": 3.2,
            "memory_bytes": 64 << 30, "memory_available_bytes": 30 << 30, "agent_cpu_s": time.process_time(),
            "agent_rss_bytes": 60_000_000,
        }  # fmt: skip

    def _broker(self, args: dict[str, Any]) -> dict[str, Any]:
        queues = [
            {"name": f"/queue/vmwrapper.guest.{vm['instance']}", "messages": 0, "bytes": 0, "consumers": 1}
            for vm in self.vms
        ]
        return {
            "kind": "embedded", "name": "in the host agent", "problem": "", "version": __version__,
            "connections": len(self.vms), "consumers": len(self.vms), "messages": 3, "bytes": 600,
            "memory_bytes": 600, "memory_limit_bytes": 256 << 20, "enqueued": 10, "dequeued": 7, "dropped": 0,
            "expired": 0, "dead_letters": 0, "bytes_received": 1, "bytes_sent": 1, "queues": queues,
        }  # fmt: skip

    def _output(self, args: dict[str, Any]) -> dict[str, Any]:
        text = b"".join(b"line %d\n" % number for number in range(20))

        def tail(start: int) -> dict[str, Any]:
            data = base64.b64encode(text[start:]).decode()
            return {"offset": min(start, len(text)), "data": data, "bytes": len(text)}

        return {"command": args["command"], "stdout": tail(args.get("stdout_from", 0)), "stderr": tail(len(text))}

    # -- what happens

    def _tick(self) -> None:
        self._owed += self._rate * TICK
        while self._owed >= 1:
            self._owed -= 1
            if len(self._running) > 100 or (self._running and self._random.random() < 0.5):
                self.end_command(self._running.pop(self._random.randrange(len(self._running))))
            else:
                self.start_command(self._random.choice(self.vms))
                self._owed -= 1  # asked and started: two events

    def start_command(self, vm: dict[str, Any], argv: str = "./worker.py 5") -> str:
        command = f"c-{next(self._numbers):016x}"
        now = time.time()
        about = {"vm": vm["vm"], "instance": vm["instance"], "command": command}
        self.commands[command] = {
            **about, "state": "running", "argv": argv, "pid": 100, "asked_at": now, "started_at": now + 0.02,
            "ended_at": None, "deadline_s": 0.0, "cpu_s": 0.0, "rss_bytes": 9_000_000, "fraction": 0.5,
            "wall_s": None, "outcome": "", "exit_code": None, "signal": "", "reason": "", "stdout_bytes": 100,
            "stderr_bytes": 0,
        }  # fmt: skip
        program = argv.partition(" ")[0]
        self._log.info("{vm} {command}: asked for {program}", event=Happened.COMMAND_ASKED, program=program, **about)
        latency = self._random.lognormvariate(-4, 0.5)
        self._log.info("{vm} {command}: runs", event=Happened.COMMAND_STARTED, pid=100, latency_s=latency, **about)
        vm["commands"] += 1
        self._running.append(command)
        return command

    def end_command(self, command: str, **result: Any) -> None:
        entry = self.commands[command]
        vm = next(vm for vm in self.vms if vm["instance"] == entry["instance"])
        vm["commands"] -= 1
        wall = time.time() - entry["started_at"]
        result = {
            "outcome": "exited",
            "exit_code": 0,
            "signal": "",
            "reason": "",
            "wall_s": wall,
            "cpu_s": wall,
            **result,
        }
        entry.update(state="ended", ended_at=time.time(), **result)
        about = {name: entry[name] for name in ("vm", "instance", "command")}
        self._log.info("{vm} {command}: {outcome}", event=Happened.COMMAND_ENDED, **about, **result)
        if command in self._running:
            self._running.remove(command)
        ended = [name for name, each in self.commands.items() if each["state"] == "ended"]
        for old in ended[: max(0, len(ended) - COMMANDS_KEPT)]:
            del self.commands[old]

    def crash(self, vm: dict[str, Any], reason: str) -> None:
        vm.update(state="crashed", agent="gone", reason=f"The VM {vm['vm']} ended unexpectedly: {reason}")
        self._log.warn(
            "{vm}: crashed {reason}",
            event=Happened.VM_STATE, vm=vm["vm"], instance=vm["instance"], state="crashed", reason=reason,
        )  # fmt: skip


class Shown:
    """What a host agent's status reporter looks at."""

    def __init__(self, host: SimulatedHost) -> None:
        self._calls = host.calls

    def host(self, args: dict[str, Any], update: Any) -> dict[str, Any]:
        return dict(self._calls["host"](args))

    def all_vms(self) -> list[dict[str, Any]]:
        return list(self._calls["vms"]({})["vms"])

    def commands(self, args: dict[str, Any], update: Any) -> dict[str, Any]:
        return dict(self._calls["commands"](args))

    def copies(self, args: dict[str, Any], update: Any) -> dict[str, Any]:
        return dict(self._calls["copies"](args))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guests", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=100.0, help="events a second")
    parser.add_argument("--seconds", type=float, default=600.0, help="ends then")
    parser.add_argument("--agent", default="h-simulated")
    options = parser.parse_args()
    reactor: Any = default_reactor
    host = SimulatedHost(reactor, options.agent, options.guests, options.rate)
    print(json.dumps(host.start().to_json()), flush=True)
    reactor.callLater(options.seconds, reactor.stop)
    reactor.addSystemEventTrigger("before", "shutdown", host.stop)
    reactor.run()


if __name__ == "__main__":
    main()
