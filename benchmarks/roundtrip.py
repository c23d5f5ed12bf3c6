"""A command's round trip in one QEMU guest, /bin/true: ours, qemu-guest-agent's guest-exec and ssh, in the same guest.

Each asks for one after the other, twenty in a row, and the rows take turns, so that whatever else the machine does
meets all of them. ssh is measured over one connection that stays (`multiplexed`), and with a new one for each command:
by itself, because half a second of cryptography empties the caches of an emulated processor for whoever is next. The
limit is what nobody can do without: starting and reaping the program in the guest, and once through the network and
back. `…_16` is the time for one of sixteen commands that are asked for at once. `ping` is our PING and PONG, through
both agents without a program; `life` is from the program's start to its end as the guest's keeper sees it.
`cpu_ratio_to_qemu_ga` is the CPU time of QEMU and the host agent for a row of ours to that for one of guest-exec, which
other work on the machine changes little.

The short form leaves ssh out, whose cryptography is what takes long in an emulated guest, and has an image without it.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import attrs

from benchmarks import SHORT
from benchmarks.agent import DEADLINE, VM, Agent, host_agent
from benchmarks.cpu import cpu_seconds
from benchmarks.open_host import doors, qemu_with
from benchmarks.peers import qga
from benchmarks.peers.image import SSH_PORT, lean_image, let_in, peers_image
from benchmarks.report import OURS, in_rows, in_turn, p99, show, timed

ROWS, ROW = 6, 20
ROUNDS_NEW, ROUNDS_16 = 20, 5
AT_ONCE = 16
PROGRAM = "/bin/true"
QGA, SSH, SSH_NEW = "qemu-ga guest-exec", "ssh, multiplexed", "ssh, new connection"
ECHO, PING, LIMIT = "network echo", "our PING and PONG", "limit: start, end, echo"
# In the guest: median of starting and reaping the program, as cheaply as the system can.
SPAWN = """
import os, statistics, time
times = []
for _ in range(50):
    began = time.perf_counter()
    os.waitpid(os.posix_spawn("/bin/true", ["true"], os.environ), 0)
    times.append(time.perf_counter() - began)
print(*times)
"""
ECHO_PORT = 7007
ECHO_SERVER = f"""
import socket
server = socket.create_server(("0.0.0.0", {ECHO_PORT}))
print("listening", flush=True)
connection, _ = server.accept()
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while data := connection.recv(4096):
    connection.sendall(data)
"""


def run() -> dict[str, float]:
    """Measure; a minute where VMs are emulated, a quarter of one in the short form; one or two more for a new image."""
    with tempfile.TemporaryDirectory(prefix="vmwrapper-bench-") as name:
        folder = Path(name)
        image = (lean_image if SHORT else peers_image)(folder / "images")
        env = qemu_with(folder, *qga.options(folder / "qga.sock"))
        options = ["--doors", str(SSH_PORT), str(ECHO_PORT)]
        with host_agent(folder / "host", module="benchmarks.open_host", options=options, env=env) as agent:
            agent.start_vm(image=str(image.directory))
            return _measure(agent, folder)


def _measure(agent: Agent, folder: Path) -> dict[str, float]:
    ways = doors(agent)
    guest_agent = qga.GuestAgent(folder / "qga.sock")
    spawns = [float(word) for word in agent.run("python3", "-c", SPAWN).split()]
    ours, echo = Ours(agent), Echo(agent, ways[ECHO_PORT])
    at_once: dict[str, Callable[[int], None]] = {OURS: ours.run, QGA: lambda count: guest_agent.run(PROGRAM, count)}
    new: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        if not SHORT:
            kept = let_in(agent, ways[SSH_PORT], folder)
            fresh = attrs.evolve(kept, control="none")
            new = in_turn({SSH_NEW: lambda: fresh.run(PROGRAM)}, ROUNDS_NEW)
            stack.enter_context(kept.master())
            at_once[SSH] = lambda count: kept.run(PROGRAM, count=count)
        singles = {name: functools.partial(work, 1) for name, work in at_once.items()}
        pids = [int(agent.call("vms")["vms"][0]["pid"]), agent.process.pid]
        work: dict[str, Callable[[], None]] = {**singles, ECHO: echo.run, PING: ours.ping}
        seconds = {name: functools.partial(timed, action) for name, action in work.items()}
        times, cpu = in_rows(seconds, ROWS, ROW, lambda: cpu_seconds(pids))
        times |= {LIMIT: [median(spawns) + each for each in times[ECHO]], **new}
        lives = ours.lives[:]
        show("/bin/true, one after the other", times, "ms", scale=1e3)
        show("the same, CPU time of QEMU and the host agent", cpu, "ms", scale=1e3 / ROW)
        # Without new connections: sixteen at once are minutes of cryptography for an emulated processor.
        together = in_turn({name: functools.partial(work, AT_ONCE) for name, work in at_once.items()}, ROUNDS_16)
        show(f"/bin/true, {AT_ONCE} at once, time for each", together, "ms", scale=1e3 / AT_ONCE)
    echo.close()
    middle = {name: median(each) for name, each in times.items()}
    sixteen = {name: median(each) / AT_ONCE for name, each in together.items()}
    found = {
        "p50_ms": middle[OURS] * 1e3,
        "p99_ms": p99(times[OURS]) * 1e3,
        "each_of_16_ms": sixteen[OURS] * 1e3,
        "ping_ms": middle[PING] * 1e3,
        "life_ms": median(lives) * 1e3,
        "spawn_ms": median(spawns) * 1e3,
        "cpu_ms": median(cpu[OURS]) / ROW * 1e3,
        "ratio_to_qemu_ga": middle[OURS] / middle[QGA],
        "ratio_to_limit": middle[OURS] / middle[LIMIT],
        "ratio_to_qemu_ga_16": sixteen[OURS] / sixteen[QGA],
        "cpu_ratio_to_qemu_ga": median(cpu[OURS]) / median(cpu[QGA]),
    }
    if SSH in middle:
        found["ratio_to_ssh_multiplexed"] = middle[OURS] / middle[SSH]
        found["ratio_to_ssh_multiplexed_16"] = sixteen[OURS] / sixteen[SSH]
    return found


@attrs.frozen
class Ours:
    """The control interface of the host agent."""

    agent: Agent
    lives: list[float] = attrs.field(factory=list)  # seconds from each program's start to its end, in the guest

    def ping(self) -> None:
        self.agent.call("ping", vm=VM)

    def run(self, count: int) -> None:
        begin = self.agent.client.begin
        answers = [begin("run", {"vm": VM, "argv": [PROGRAM]}) for _ in range(count)]
        for answer in answers:
            result = answer.wait(time.monotonic() + DEADLINE)
            if result["exit_code"] != 0:
                raise RuntimeError(f"{PROGRAM} failed in the guest")
            self.lives.append(result["wall_s"])


class Echo:
    """200 bytes to the guest and back."""

    def __init__(self, agent: Agent, port: int) -> None:
        listening: list[str] = []
        request = {"vm": VM, "argv": ["python3", "-c", ECHO_SERVER], "stream": True}
        agent.client.start("run", request, lambda name, data: listening.append(name))
        while "output" not in listening:
            agent.client.wait_until(time.monotonic() + DEADLINE)
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def run(self) -> None:
        self._socket.sendall(b"x" * 200)
        have = 0
        while have < 200:
            have += len(self._socket.recv(4096))

    def close(self) -> None:
        self._socket.close()
