"""A command's round trip with the guest agent as a local process, against ssh to this host and Celery on RabbitMQ.

`/bin/true`, one after the other, twenty in a row, and the rows take turns, so that whatever else the machine does meets
all of them. Ours over the embedded broker: host agent, guest agent and client are processes of their own, as in real
life. ssh keeps its connection to an sshd on the loopback. Celery has one worker process. The limit is what nobody can
do without: two bare sockets on the same broker, one of which starts the program, waits for its end and answers. `bare`
is that start and wait by itself, from Python. `cpu_ratio_to_bare` compares the CPU time of all agents for a command and
a PING with that of a bare start and wait, which other load changes little.

The short form leaves ssh, Celery and RabbitMQ out.
"""

from __future__ import annotations

import contextlib
import resource
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import psutil

from benchmarks import SHORT
from benchmarks.agent import VM, Agent, host_agent
from benchmarks.bare_stomp import consumer, embedded_broker, receive_frame, send_frame, server
from benchmarks.peers.celery import celery, speaks_amqp
from benchmarks.peers.packages import Unavailable, need
from benchmarks.peers.ssh import local_ssh
from benchmarks.report import OURS, in_rows, p99, show, timed
from tests.brokers import RunningBroker

ROWS, ROW = (6 if SHORT else 15), 20
PROGRAM = "/bin/true"
SSH, CELERY, LIMIT, BARE = "ssh, multiplexed", "Celery on RabbitMQ", "limit: STOMP, fork, exec", "bare fork, exec, wait"
RABBITMQ, PING = "ours on RabbitMQ", "our PING and PONG"

# The other end of the limit: everything but the work is left out.
_RUNNER = """
import os, sys
from benchmarks.bare_stomp import consumer, receive_frame, send_frame
client = consumer(int(sys.argv[1]), "run", ack="auto")
print("listening on 127.0.0.1:0", flush=True)
reply = send_frame("ran", b"x" * 200)
while True:
    receive_frame(client)
    os.waitpid(os.posix_spawn("/bin/true", ["true"], os.environ), 0)
    client.sendall(reply)
"""


@contextlib.contextmanager
def limit(folder: Path) -> Iterator[Callable[[], object]]:
    """A request and its reply by bare sockets through the embedded broker, with the program between them."""
    with embedded_broker(folder) as broker, server(_RUNNER, str(broker.port)):
        client = consumer(broker.port, "ran", ack="auto")
        request = send_frame("run", b"x" * 200)

        def ask() -> None:
            client.sendall(request)
            receive_frame(client)

        yield ask
        client.close()


def run() -> dict[str, float]:
    """Measure; a minute, and a few seconds in its short form."""
    with tempfile.TemporaryDirectory(prefix="vmwrapper-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        agent = stack.enter_context(host_agent(folder / "ours", "process"))
        agent.start_vm()
        work: dict[str, Callable[[], float]] = {
            OURS: lambda: timed(lambda: agent.call("run", vm=VM, argv=[PROGRAM])),
            PING: lambda: float(agent.call("ping", vm=VM)["round_trip_s"]),
            BARE: lambda: timed(lambda: subprocess.run([PROGRAM], check=True)),
        }
        ask = stack.enter_context(limit(folder))
        work[LIMIT] = lambda: timed(ask)
        missing = {} if SHORT else _peers(folder, work, stack)
        in_rows(work, 1, ROW, _own_cpu_s)  # warm
        before = _cpu_s(agent)
        times, own_cpu = in_rows(work, ROWS, ROW, _own_cpu_s)
        spent = _cpu_s(agent) - before
        show("/bin/true, one after the other", times, "ms", scale=1e3, missing=missing)
        return _metrics(times, spent, sum(own_cpu[BARE]))


def _peers(folder: Path, work: dict[str, Callable[[], float]], stack: contextlib.ExitStack) -> dict[str, str]:
    """Start the others; why some of them cannot run."""
    missing = {}
    try:
        ssh = stack.enter_context(local_ssh(folder))
        work[SSH] = lambda: timed(lambda: ssh.run(PROGRAM))
    except Unavailable as reason:
        missing[SSH] = str(reason)
    try:
        need("rabbitmq-server")
        rabbitmq = RunningBroker.rabbitmq(folder)
        port = speaks_amqp(rabbitmq)
        stack.enter_context(rabbitmq)
        options = ["--broker", str(rabbitmq.settings_file)]
        other = stack.enter_context(host_agent(folder / "other", "process", options=options))
        other.start_vm()
        work[RABBITMQ] = lambda: timed(lambda: other.call("run", vm=VM, argv=[PROGRAM]))
        run_by_celery = stack.enter_context(celery(port, folder))
        work[CELERY] = lambda: run_by_celery(PROGRAM)
    except Unavailable as reason:
        missing[CELERY] = str(reason)
    return missing


def _metrics(times: dict[str, list[float]], spent: float, bare_cpu: float) -> dict[str, float]:
    middle = {name: median(each) for name, each in times.items()}
    ours = middle[OURS]
    names = {"ratio_to_celery": CELERY, "ratio_to_limit": LIMIT, "ratio_to_ssh_multiplexed": SSH, "ratio_to_bare": BARE}
    found = {"p50_ms": ours * 1e3, "p99_ms": p99(times[OURS]) * 1e3}
    found.update({key: ours / middle[name] for key, name in names.items() if name in middle})
    if CELERY in middle:
        found["rabbitmq_ratio_to_celery"] = middle[RABBITMQ] / middle[CELERY]
    return {
        **found,
        "limit_ms": middle[LIMIT] * 1e3,
        "bare_ms": middle[BARE] * 1e3,
        "ping_ms": middle[PING] * 1e3,
        "cpu_ms": spent / len(times[OURS]) * 1e3,
        "cpu_ratio_to_bare": spent / bare_cpu,
    }


def _cpu_s(agent: Agent) -> float:
    """Of host agent, guest agent and keeper, and of the programs that they waited for."""
    tree = [agent.process, *agent.process.children(recursive=True)]
    tree += [each for each in psutil.process_iter(["cmdline"]) if _is_keeper_of(each, agent)]
    return sum(sum(process.cpu_times()[:4]) for process in dict.fromkeys(tree))


def _is_keeper_of(process: psutil.Process, agent: Agent) -> bool:
    """The keeper is nobody's child; its home is in the folder of this run."""
    return any(word.startswith(str(agent.folder / "vms")) for word in process.info["cmdline"] or [])


def _own_cpu_s() -> float:
    """Of this process and of those that it waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
