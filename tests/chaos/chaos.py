"""The chaos run: host agent, guest agents, keepers, guests and broker are killed while commands and copies go on.

The requester does what a wrapper does: it chooses ids, and asks again with the same id whenever it finds the host
agent anew. An answer `lost` is allowed only where programs were killed with their guest; then the work is asked for
under a new id. In the end every id must have had at most one effect, and every one that was answered with its exit
code exactly one.
"""

from __future__ import annotations

import contextlib
import random
import select
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import psutil

from host_agent.control_client import ControlError
from tests.brokers import RunningBroker
from tests.system.agent_process import AgentProcess

from .work import Command, Copy, Work

KINDS = ("host", "guest", "keeper", "reboot", "vm", "broker")
GUESTS = ("g1", "g2", "g3")
IN_FLIGHT = 24
PATIENCE = 180.0  # seconds that one piece of work may take after the last kill


@attrs.frozen
class Plan:
    """What is done, and what is done to it."""

    broker: str
    commands: int
    copies: int
    kills: int
    seed: int
    kinds: tuple[str, ...] = KINDS


class Chaos:
    """One run in an empty folder."""

    def __init__(self, plan: Plan, folder: Path, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._folder = folder
        self._say = say
        self._random = random.Random(plan.seed)
        self._broker: RunningBroker | None = None
        self._agent = AgentProcess(folder)
        self._todo: list[Work] = self._make_work()
        self._in_flight: dict[str, Work] = {}
        self._ran: set[str] = set()  # ids that were answered with an exit code
        self._problems: list[str] = []
        self.lost = 0  # answers that said so
        self._counts: Counter[str] = Counter()
        self._homes: dict[str, Path] = {}
        self._last_kill = time.monotonic()

    def _make_work(self) -> list[Work]:
        rng = self._random
        work: list[Work] = []
        for number in range(self._plan.commands):
            lines = rng.choice((0, 0, 3, 200, 20_000))
            pause = rng.choice((0.0, 0.0, 0.05, 0.6))
            work.append(Command(number, rng.choice(GUESTS), lines=lines, pause=pause, exit_code=rng.randrange(4)))
        for number in range(self._plan.copies):
            size = rng.choice((0, 1, 5000, 300_000, 4_000_000))
            work.append(Copy(number, rng.choice(GUESTS), inwards=rng.random() < 0.5, size=size))
        rng.shuffle(work)
        return work

    def run(self) -> list[str]:
        """Returns what went wrong, one sentence each."""
        try:
            self._start()
            total, kills = len(self._todo), 0
            while self._todo or self._in_flight:
                self._fill()
                done = total - len(self._todo) - len(self._in_flight)
                if kills < self._plan.kills and done >= kills * total / (self._plan.kills + 1):
                    kills += 1
                    self._kill()
                    if kills % 20 == 0:
                        self._say(f"{self._plan.broker}: {done} of {total} done, {kills} kills {dict(self._counts)}")
                self._receive()
                if time.monotonic() - max(self._last_kill, *self._asked_times()) > PATIENCE:
                    waiting = ", ".join(sorted(self._in_flight)[:10])
                    self._problems.append(f"no answer for {PATIENCE:.0f} s: {waiting}")
                    break
        finally:
            self._end()
        self._count_effects()
        return self._problems

    def _asked_times(self) -> list[float]:
        return [work.asked_at for work in self._in_flight.values()] or [time.monotonic()]

    def _start(self) -> None:
        (self._folder / "effects").touch()
        if self._plan.broker != "embedded":
            self._broker = RunningBroker.make(self._plan.broker, self._folder, guests=len(GUESTS) + 2)
            self._broker.start()
            self._agent.options = ("--broker", str(self._broker.settings_file))
        self._agent.start()
        for name in GUESTS:
            self._start_vm(name)

    def _start_vm(self, name: str) -> None:
        self._agent.start_vm(name)
        self._homes[name] = self._agent.home(name)

    # -- asking

    def _fill(self) -> None:
        while self._todo and len(self._in_flight) < IN_FLIGHT:
            work = self._todo.pop()
            if isinstance(work, Copy):
                work.prepare(self._folder, self._homes[work.vm])
            self._in_flight[work.id] = work
            self._ask(work)

    def _ask(self, work: Work) -> None:
        work.asked_at = time.monotonic()
        client = self._agent.client
        assert client is not None
        if isinstance(work, Command):
            call, request = "run", work.request(self._folder)
        else:
            assert isinstance(work, Copy)
            call, request = ("put" if work.inwards else "get"), work.request(self._folder)

        def ended(result: dict[str, Any] | None, error: ControlError | None) -> None:
            if client is self._agent.client:
                self._answered(work, result, error)

        with contextlib.suppress(ControlError):  # then the agent is gone, and it is asked again
            client.start(call, request, on_end=ended)

    def _receive(self) -> None:
        client = self._agent.client
        assert client is not None
        if select.select([client], [], [], 0.2)[0]:
            client.receive()
        if client.closed:
            self._problems.append(f"the host agent ended by itself: {client.closed}")
            self._restart_agent()

    def _answered(self, work: Work, result: dict[str, Any] | None, error: ControlError | None) -> None:
        if error is not None and error.code == "closed":
            return
        del self._in_flight[work.id]
        if isinstance(work, Copy):
            wrong = str(error) if error is not None else work.wrong(self._folder, self._homes[work.vm])
            if error is None and wrong:
                self._problems.append(wrong)
            elif error is not None:
                self._again(work, wrong)
            return
        assert isinstance(work, Command)
        if result is None:
            self._again(work, str(error))
        elif result["outcome"] == "exited":
            self._ran.add(work.id)
            if wrong := work.wrong(self._folder, result):
                self._problems.append(wrong)
        else:
            self._again(work, f"{result['outcome']}: {result['reason']}")

    def _again(self, work: Work, why: str) -> None:
        """It was lost with its guest. Any other reason is a mistake of ours."""
        self._counts["lost with a guest"] += 1
        self.lost += 1
        if not any(self._counts[kind] for kind in ("keeper", "reboot", "vm")):
            self._problems.append(f"{work.id}: {why}")
        self._todo.append(attrs.evolve(work, attempt=work.attempt + 1))

    # -- killing

    def _kill(self) -> None:
        kinds = [kind for kind in self._plan.kinds if kind != "broker" or self._broker is not None]
        weights = [3 if kind in ("host", "guest") else 1 for kind in kinds]
        kind = self._random.choices(kinds, weights)[0]
        self._counts[kind] += 1
        name = self._random.choice(GUESTS)
        self._last_kill = time.monotonic()
        if kind == "host":
            self._restart_agent()
        elif kind == "broker":
            assert self._broker is not None
            self._broker.kill()
            self._broker.restart()
        elif kind == "vm":
            self._agent.call("stop_vm", vm=name)
            self._start_vm(name)
        else:
            self._kill_in_guest(kind, name)
        self._last_kill = time.monotonic()

    def _restart_agent(self) -> None:
        self._agent.restart()
        for work in list(self._in_flight.values()):
            self._ask(work)

    def _kill_in_guest(self, kind: str, name: str) -> None:
        """Its process 1 stays, as a kernel would, and starts the agent again."""
        (vm,) = [each for each in self._agent.call("vms")["vms"] if each["vm"] == name]
        home = str(self._homes[name])
        for process in psutil.process_iter(["cmdline", "ppid"]):
            if home not in (process.info["cmdline"] or []) or process.pid == vm["pid"]:
                continue
            is_agent = process.info["ppid"] == vm["pid"]
            with contextlib.suppress(psutil.Error):
                if kind != "guest" and not is_agent:
                    for child in process.children(recursive=True):
                        child.kill()
                if kind == "reboot" or is_agent == (kind == "guest"):
                    process.kill()

    # -- the end

    def _end(self) -> None:
        self._agent.end()
        if self._broker is not None:
            self._broker.close()
        for process in self._agent.left_over():
            self._problems.append(f"left over: process {process.pid} {process.cmdline()}")
            process.kill()
        places = [self._folder / "vms", self._folder / "run" / "vms", self._folder / "run" / "agents"]
        left = [path for place in places if place.exists() for path in place.iterdir()]
        left += self._folder.glob(".*.part")
        left += [path for path in [self._folder / "state"] if path.exists()]
        self._problems += [f"left over: {path}" for path in left]

    def _count_effects(self) -> None:
        effects = Counter((self._folder / "effects").read_text().split())
        self._problems += [f"{name} was run {count} times" for name, count in effects.items() if count > 1]
        self._problems += [f"{name} exited, but was never run" for name in self._ran if not effects[name]]
        if len(self._ran) != self._plan.commands:
            self._problems.append(f"{self._plan.commands - len(self._ran)} commands were lost")
        self._say(f"{self._plan.broker}: kills {dict(self._counts)}")
