"""Many guests on one host agent: 10, 100, 1,000, with the real agents' code, on each broker.

The guests are simulated (`scale_guests.py`: everything of an agent but its programs), many in a process; host agent,
broker and client are as in real life. 10,000 commands at 1,000 guests, 64 of them at a time, one in ten with output,
while guests leave and others join. `per_guest_cost` is the CPU time of host agent and broker for ten commands of one
guest, without what they need anyway, which is `idle`: theirs for one guest that does nothing. `rss` is what their
memory grows by for one guest. `cores` are those that host agent and broker, all guests, and the client kept busy: on a
machine of two the simulated guests want as much as what is measured. Keys without a broker's name are of the first
broker, the embedded one, with the most guests; `lost` and `repeated` are sums over everything.

VMWRAPPER_BENCH_BROKERS="embedded activemq" chooses brokers. VMWRAPPER_BENCH_SHORT=1 runs 10 and 50 guests on the
embedded broker alone.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import quantiles
from typing import Any

import attrs
import psutil

from benchmarks import profiles
from benchmarks.scale_guests import OUTPUT
from host_agent.control_client import ControlClient, ControlError, parse_endpoint

SHORT = bool(os.environ.get("VMWRAPPER_BENCH_SHORT"))
SIZES = {10: 300, 50: 600} if SHORT else {10: 1000, 100: 2000, 1000: 10_000}  # guests: commands
BROKERS = (
    ("embedded",) if SHORT else tuple(os.environ.get("VMWRAPPER_BENCH_BROKERS", "embedded activemq rabbitmq").split())
)
IN_FLIGHT = 64
JOINING = 32  # guests that start at a time
SWARMS = 4  # processes of guests
CHANGES = 10  # times that guests leave and others join, during the commands
LEAVING = 0.01  # of all guests, each time
IDLE_SECONDS = 0.5 if SHORT else 20.0
DEADLINE = 600.0  # seconds for one phase
START_DEADLINE = 300.0


@attrs.define
class Load:
    """What is asked of the host agent, and what came of it."""

    client: ControlClient
    folder: Path
    ready: list[str] = attrs.field(factory=list)  # guests that take commands
    busy: Counter[str] = attrs.field(factory=Counter)
    asked: int = 0
    ended: int = 0
    lost: int = 0
    latencies: list[float] = attrs.field(factory=list)
    pending: int = 0  # starts and ends of guests
    names: int = 0
    dice: random.Random = attrs.field(factory=lambda: random.Random(1))  # noqa: S311

    def pump(self) -> None:
        if not select.select([self.client], [], [], DEADLINE)[0]:
            raise RuntimeError("the host agent is silent")
        self.client.receive()

    def join(self, count: int) -> None:
        """Start guests, some at a time."""
        waiting = deque(f"g{self.names + number:05}" for number in range(count))
        self.names += count
        until = time.monotonic() + DEADLINE
        self.pending += count
        open_starts = 0

        def started(name: str) -> Any:
            def end(result: Mapping[str, Any] | None, error: ControlError | None) -> None:
                nonlocal open_starts
                open_starts -= 1
                self.pending -= 1
                if error is not None:
                    raise RuntimeError(str(error))
                self.ready.append(name)

            return end

        while waiting or open_starts:
            while waiting and open_starts < JOINING:
                open_starts += 1
                self._start(waiting[0], started(waiting.popleft()))
            self.pump()
            if time.monotonic() > until:
                raise RuntimeError(f"{open_starts + len(waiting)} guests did not join in {DEADLINE:.0f} s")

    def _start(self, name: str, end: Any) -> None:
        request = {"vm": name, "directory": str(self.folder / "vms"), "deadline_s": START_DEADLINE}
        self.client.start("start_vm", request, on_end=end)

    def change(self, count: int) -> None:
        """Guests that have nothing to do leave, and others take their places; nobody waits for that."""
        idle = [name for name in self.ready if not self.busy[name]][:count]
        for name in idle:
            self.ready.remove(name)
            self.pending += 1
            self.client.start("stop_vm", {"vm": name}, on_end=self._left)

    def _left(self, result: Mapping[str, Any] | None, error: ControlError | None) -> None:
        if error is not None:
            raise RuntimeError(str(error))
        name = f"g{self.names:05}"
        self.names += 1

        def joined(result: Mapping[str, Any] | None, error: ControlError | None) -> None:
            if error is not None:
                raise RuntimeError(str(error))
            self.pending -= 1
            self.ready.append(name)

        self._start(name, joined)

    def run(self, count: int) -> float:
        """Commands, with changes of guests between them; the seconds that they took."""
        began = time.perf_counter()
        first = self.asked
        steps = {first + count * number // (CHANGES + 1) for number in range(1, CHANGES + 1)}
        while self.ended < first + count:
            while self.asked < first + count and self.asked - self.ended < IN_FLIGHT:
                if self.asked in steps:
                    steps.discard(self.asked)
                    self.change(max(1, int(len(self.ready) * LEAVING)))
                self._ask()
            self.pump()
        seconds = time.perf_counter() - began
        while self.pending:
            self.pump()
        return seconds

    def _ask(self) -> None:
        name = self.dice.choice(self.ready)
        talks = self.asked % 10 == 0
        self.asked += 1
        self.busy[name] += 1
        began = time.perf_counter()

        def end(result: Mapping[str, Any] | None, error: ControlError | None) -> None:
            self.busy[name] -= 1
            self.ended += 1
            self.latencies.append(time.perf_counter() - began)
            whole = result is not None and result["stdout_bytes"] == (len(OUTPUT) if talks else 0)
            self.lost += not (result is not None and result["outcome"] == "exited" and whole)

        self.client.start("run", {"vm": name, "argv": ["talk" if talks else "be-quiet"]}, on_end=end)


def measure(broker: Any, kind: str, guests: int, commands: int) -> dict[str, float]:
    """One number of guests on one broker."""
    shared = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108  (guests have disks of their own)
    with tempfile.TemporaryDirectory(prefix="vmwrapper-scale-", dir=shared) as name:
        folder = Path(name)
        argv = [*profiles.python("benchmarks.scale_host", "scale-host"), name, str(SWARMS)]
        argv += [str(broker.settings_file)] if broker is not None else []
        env = {**os.environ, "VMWRAPPER_RUNTIME": f"{name}/run"}
        with (folder / "host.log").open("wb") as log:
            host = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, env=env)
        try:
            return _measure(host, broker, folder, guests, commands)
        except Exception:
            sys.stderr.write((folder / "host.log").read_text("utf-8", "replace")[-3000:])
            raise
        finally:
            host.kill()
            host.wait()


def _measure(host: subprocess.Popen[bytes], broker: Any, folder: Path, guests: int, commands: int) -> dict[str, float]:
    assert host.stdout is not None
    client = ControlClient.connect(parse_endpoint(host.stdout.readline()))
    load = Load(client, folder)
    processes = [psutil.Process(pid) for pid in (host.pid, *(broker.pids if broker is not None else ()))]
    rss = _memory(processes)
    began = time.perf_counter()
    load.join(guests)
    joined_s = time.perf_counter() - began
    grown = _memory(processes) - rss
    before, began = _cpu(processes), time.perf_counter()
    while (left := began + IDLE_SECONDS - time.perf_counter()) > 0:
        select.select([], [], [], left)
    idle = (_cpu(processes) - before) / guests / (time.perf_counter() - began)
    swarms, own = psutil.Process(host.pid).children(), [psutil.Process()]
    before, guests_before, own_before = _cpu(processes), _cpu(swarms), _cpu(own)
    seconds = load.run(commands)
    spent, of_guests, of_client = _cpu(processes) - before, _cpu(swarms) - guests_before, _cpu(own) - own_before
    cpu = spent - idle * guests * seconds
    client.call("shutdown", deadline_s=DEADLINE)
    host.wait(DEADLINE)
    runs = Counter(line for file in folder.glob("runs-*") for line in file.read_text().split())
    return {
        "lost": load.lost + load.asked - load.ended,
        "repeated": sum(count - 1 for count in runs.values()) + abs(len(runs) - load.asked),
        "commands_per_s": commands / seconds,
        "p50_s": quantiles(load.latencies, n=100)[49],
        "p99_s": quantiles(load.latencies, n=100)[98],
        "per_guest_cost_ms": cpu / commands * 10 * 1e3,
        "idle_ms_per_guest_per_min": idle * 60 * 1e3,
        "rss_kb_per_guest": grown / guests / 1024,
        "join_ms_per_guest": joined_s / guests * 1e3,
        "host_cores": spent / seconds,
        "guests_cores": of_guests / seconds,
        "client_cores": of_client / seconds,
    }


def _cpu(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def _memory(processes: list[psutil.Process]) -> float:
    return float(sum(process.memory_info().rss for process in processes))


@contextlib.contextmanager
def _broker(kind: str) -> Iterator[Any]:
    if kind == "embedded":
        yield None
        return
    from tests.brokers import RunningBroker

    with tempfile.TemporaryDirectory(prefix="vmwrapper-scale-") as name:
        broker = RunningBroker.make(kind, Path(name), guests=max(SIZES), java_options="-Xms64M -Xmx1024M")
        with broker:
            yield broker


def run() -> dict[str, float]:
    """Measure; about ten minutes, a quarter of one in its short form."""
    found: dict[str, float] = {"lost": 0, "repeated": 0}
    for kind in BROKERS:
        with _broker(kind) as broker:
            for guests, commands in SIZES.items():
                part = measure(broker, kind, guests, commands)
                line = ", ".join(f"{key} {value:.3f}" for key, value in part.items())
                print(f"{kind}, {guests} guests: {line}", flush=True)
                found["lost"] += part.pop("lost")
                found["repeated"] += part.pop("repeated")
                found.update({f"{kind}_{guests}_{key}": value for key, value in part.items()})
    most, least = max(SIZES), min(SIZES)
    first = BROKERS[0]
    for key in ("commands_per_s", "p99_s"):
        found[key] = found[f"{first}_{most}_{key}"]
    cost = "per_guest_cost_ms"
    ratio = "per_guest_cost_ratio_1000_to_10" if most == 1000 else f"per_guest_cost_ratio_{most}_to_{least}"
    found[ratio] = found[f"{first}_{most}_{cost}"] / found[f"{first}_{least}_{cost}"]
    return found
