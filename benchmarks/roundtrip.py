"""A command's round trip in one QEMU guest, /bin/true: ours, qemu-guest-agent's guest-exec and ssh, in the same guest.

They take turns, so that whatever else the machine does meets all of them. ssh is measured over one connection that
stays (`multiplexed`) and with a new one for each command. The limit is what nobody can do without: starting and
reaping the program in the guest, and once through the network and back. `…_16` is the time for one of sixteen
commands that are asked for at once. `ping` is our PING and PONG, through both agents without a program; `life` is from
the program's start to its end as the guest's keeper sees it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import attrs

from benchmarks.peers_image import peers_image
from benchmarks.roundtrip_host import FORWARDS, QGA_SOCKET
from host_agent.control_client import ControlClient, parse_endpoint

SHORT = bool(os.environ.get("VMWRAPPER_BENCH_SHORT"))
ROUNDS = 12 if SHORT else 40
ROUNDS_16 = 1 if SHORT else 5
AT_ONCE = 16
PROGRAM = "/bin/true"
DEADLINE = 300.0
USER = "vmwrapper"
# In the guest: median of starting and reaping the program, as cheaply as the system can.
SPAWN = """
import os, statistics, time
times = []
for _ in range(50):
    began = time.perf_counter()
    os.waitpid(os.posix_spawn("/bin/true", ["true"], os.environ), 0)
    times.append(time.perf_counter() - began)
print(statistics.median(times))
"""
ECHO_PORT = 7007
ECHO = f"""
import socket
server = socket.create_server(("0.0.0.0", {ECHO_PORT}))
print("listening", flush=True)
connection, _ = server.accept()
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while data := connection.recv(4096):
    connection.sendall(data)
"""


class GuestAgent:
    """qemu-guest-agent's protocol: JSON objects, a line each, one request at a time."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(DEADLINE)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        mark = secrets.randbelow(1 << 30)
        self._socket.sendall(
            b"\xff" + json.dumps({"execute": "guest-sync", "arguments": {"id": mark}}).encode() + b"\n"
        )
        while json.loads(self._lines.readline().lstrip(b"\xff")).get("return") != mark:
            pass

    def ask(self, command: str, **arguments: Any) -> Any:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        return json.loads(self._lines.readline())["return"]

    def run(self, count: int = 1) -> None:
        """Start programs, and ask after them until all have ended."""
        waiting = [self.ask("guest-exec", path=PROGRAM)["pid"] for _ in range(count)]
        while waiting:
            waiting = [pid for pid in waiting if not self.ask("guest-exec-status", pid=pid)["exited"]]


@attrs.frozen
class Ssh:
    """OpenSSH's client; `control` is the socket of a connection that stays, or `none`."""

    port: int
    key: Path
    control: str

    def argv(self, *words: str) -> list[str]:
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "BatchMode=yes"]
        options += [f"ControlPath={self.control}", "ConnectTimeout=60"]
        flags = [word for option in options for word in ("-o", option)]
        return ["ssh", "-i", str(self.key), "-p", str(self.port), *flags, f"{USER}@127.0.0.1", *words]

    def run(self, count: int = 1) -> None:
        running = [subprocess.Popen(self.argv(PROGRAM), stdin=subprocess.DEVNULL) for _ in range(count)]
        for each in running:
            if each.wait(DEADLINE):
                raise RuntimeError(f"ssh ended with {each.returncode}")

    @contextmanager
    def master(self) -> Iterator[None]:
        """The connection that stays."""
        argv = self.argv()
        process = subprocess.Popen([*argv[:1], "-M", "-N", *argv[1:]], stdin=subprocess.DEVNULL)
        try:
            until = time.monotonic() + DEADLINE
            while not Path(self.control).exists():
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError("ssh does not connect")
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            process.wait(DEADLINE)


def run() -> dict[str, float]:
    """Measure; three minutes where VMs are emulated, and one or two more when the image is built."""
    with tempfile.TemporaryDirectory(prefix="vmwrapper-bench-") as name:
        folder = Path(name)
        image = peers_image(folder / "images")
        argv = [sys.executable, "-m", "benchmarks.roundtrip_host", "--state", f"{name}/state"]
        ssh_port, echo_port = _free_ports(2)
        env = {**os.environ, "VMWRAPPER_RUNTIME": f"{name}/run", FORWARDS: f"{ssh_port}:22,{echo_port}:{ECHO_PORT}"}
        with (folder / "agent.log").open("wb") as log:
            agent = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, env=env)
        client: ControlClient | None = None
        try:
            assert agent.stdout is not None
            client = ControlClient.connect(parse_endpoint(agent.stdout.readline()))
            request = {"vm": "bench", "image": str(image.directory), "directory": f"{name}/vms"}
            client.call("start_vm", request, deadline_s=DEADLINE)
            return _measure(client, folder, ssh_port, echo_port)
        except Exception:
            sys.stderr.write((folder / "agent.log").read_text("utf-8", "replace")[-3000:])
            raise
        finally:
            if client is not None:
                client.call("shutdown", deadline_s=DEADLINE)
            agent.wait(DEADLINE)


def _measure(client: ControlClient, folder: Path, ssh_port: int, echo_port: int) -> dict[str, float]:
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    place = folder / "dot-ssh"
    place.mkdir(mode=0o700)
    shutil.copyfile(f"{key}.pub", place / "authorized_keys")
    client.call("put", {"vm": "bench", "source": str(place), "destination": ".ssh"}, deadline_s=DEADLINE)
    spawn_s = float(_output(client, folder, SPAWN))
    ours, qga = Ours(client), GuestAgent(next((folder / "run").rglob(QGA_SOCKET)))
    new, kept = Ssh(ssh_port, key, "none"), Ssh(ssh_port, key, str(folder / "ssh.sock"))
    echo = Echo(client, echo_port)
    with kept.master():
        workers: dict[str, Callable[[int], object]] = {
            "": ours.run, "qemu_ga_": qga.run, "ssh_multiplexed_": kept.run, "ssh_new_": new.run, "echo_": echo.run,
            "ping_": ours.ping,
        }  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(ROUNDS):
            for name, work in workers.items():
                times[name].append(_time(work, 1))
        print("one at a time: " + ", ".join(f"{name}p50_ms {median(each) * 1e3:.1f}" for name, each in times.items()))
        sys.stdout.flush()
        # Sixteen new connections at once are minutes of cryptography for an emulated processor.
        at_once: dict[str, list[float]] = {name: [] for name in workers if name not in ("echo_", "ping_", "ssh_new_")}
        for _ in range(ROUNDS_16):
            for name, of_one in at_once.items():
                of_one.append(_time(workers[name], AT_ONCE) / AT_ONCE)
    echo.close()
    found = {f"{name}p50_ms": median(values) * 1e3 for name, values in times.items()}
    found["p99_ms"] = quantiles(times[""], n=100)[98] * 1e3
    found.update({f"{name}each_of_16_ms": median(values) * 1e3 for name, values in at_once.items()})
    found["life_p50_ms"] = median(ours.lives[:ROUNDS]) * 1e3
    found["spawn_ms"] = spawn_s * 1e3
    found["limit_ms"] = found["spawn_ms"] + found["echo_p50_ms"]
    found["ratio_to_qemu_ga"] = found["p50_ms"] / found["qemu_ga_p50_ms"]
    found["ratio_to_ssh_multiplexed"] = found["p50_ms"] / found["ssh_multiplexed_p50_ms"]
    found["ratio_to_limit"] = found["p50_ms"] / found["limit_ms"]
    found["ratio_to_qemu_ga_16"] = found["each_of_16_ms"] / found["qemu_ga_each_of_16_ms"]
    found["ratio_to_ssh_multiplexed_16"] = found["each_of_16_ms"] / found["ssh_multiplexed_each_of_16_ms"]
    return found


@attrs.frozen
class Ours:
    """The control interface of the host agent."""

    client: ControlClient
    lives: list[float] = attrs.field(factory=list)  # seconds from each program's start to its end, in the guest

    def ping(self, count: int = 1) -> None:
        self.client.call("ping", {"vm": "bench"}, deadline_s=DEADLINE)

    def run(self, count: int = 1) -> None:
        answers = [self.client.begin("run", {"vm": "bench", "argv": [PROGRAM]}) for _ in range(count)]
        for answer in answers:
            result = answer.wait(time.monotonic() + DEADLINE)
            if result["exit_code"] != 0:
                raise RuntimeError(f"{PROGRAM} failed in the guest")
            self.lives.append(result["wall_s"])


class Echo:
    """200 bytes to the guest and back."""

    def __init__(self, client: ControlClient, port: int) -> None:
        listening: list[str] = []
        request = {"vm": "bench", "argv": ["python3", "-c", ECHO], "stream": True}
        client.start("run", request, lambda name, data: listening.append(name))
        while "output" not in listening:
            client.wait_until(time.monotonic() + DEADLINE)
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def run(self, count: int = 1) -> None:
        self._socket.sendall(b"x" * 200)
        have = 0
        while have < 200:
            have += len(self._socket.recv(4096))

    def close(self) -> None:
        self._socket.close()


def _free_ports(count: int) -> list[int]:
    """Free now; QEMU takes them a moment later."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _time(work: Callable[[int], object], count: int) -> float:
    began = time.perf_counter()
    work(count)
    return time.perf_counter() - began


def _output(client: ControlClient, folder: Path, script: str) -> str:
    file = folder / "output"
    client.call("run", {"vm": "bench", "argv": ["python3", "-c", script], "stdout": str(file)}, deadline_s=DEADLINE)
    return file.read_text()
