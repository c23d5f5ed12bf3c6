"""Real external brokers as processes of a test: set up by `vmctl broker init`'s own code, on free loopback ports.

with RunningBroker.activemq(tmp_path, tls=True) as broker:
    build_host_agent(..., external=broker.settings)
    broker.kill()
    broker.restart()
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import attrs
import psutil

from host_agent.broker.settings import BrokerSettings
from host_agent.broker.setup.init import set_up
from host_agent.broker.setup.plan import Limits, Plan, host_logins

READY_SECONDS = 120.0  # on a loaded machine; ActiveMQ and RabbitMQ need about 10
STOP_SECONDS = 30.0
QUICK_JAVA = "-Xms64M -Xmx512M -XX:+UseSerialGC -XX:TieredStopAtLevel=1"  # a quarter of the time to start
# A test that is killed cleans nothing up; Linux then tells its brokers to end.
END_WITH_US = ("setpriv", "--pdeathsig", "TERM")
TESTER = "tester"
TESTER_PASSCODE = "a passcode"
_GIVEN: set[int] = set()  # by free_port()


class BrokerFailed(Exception):
    """A broker did not start or did not end; with the end of its log."""


@attrs.define
class RunningBroker:
    """One broker with its configuration. `settings` is for `--broker`; `plan` has every login.

    The login `tester`, which only tests have, may use every destination that begins with `contract.`.
    """

    plan: Plan
    _process: subprocess.Popen[bytes] | None = None
    _epmd: subprocess.Popen[bytes] | None = None
    _epmd_port: int = 0
    _dist_port: int = 0
    _java_options: str = ""

    @classmethod
    def activemq(cls, folder: Path, *, tls: bool = False, **options: object) -> RunningBroker:
        return cls.make("activemq", folder, tls=tls, **options)  # type: ignore[arg-type]

    @classmethod
    def rabbitmq(cls, folder: Path, *, tls: bool = False, **options: object) -> RunningBroker:
        return cls.make("rabbitmq", folder, tls=tls, **options)  # type: ignore[arg-type]

    @classmethod
    def make(
        cls,
        kind: str,
        folder: Path,
        *,
        tls: bool = False,
        hosts: Sequence[str] = ("host-a",),
        guests: int = 4,
        names: Sequence[str] = ("localhost",),
        limits: Limits | None = None,
        java_options: str = QUICK_JAVA,
        management: bool = False,
    ) -> RunningBroker:
        """Set a broker up in a new directory of `folder`; it does not run yet."""
        number = sum(1 for _ in folder.glob(f"{kind}-*"))
        plan = set_up(
            kind,
            folder / f"{kind}-{number}",
            [host_logins(host, guests) for host in hosts],
            port=free_port(),
            names=names,
            tls=tls,
            limits=limits,
            management_port=free_port() if management else 0,
        )
        _TESTERS[kind](plan)
        return cls(plan, epmd_port=free_port(), dist_port=free_port(), java_options=java_options)

    def twin(self, folder: Path) -> RunningBroker:
        """Another broker of the same kind that knows the same logins, for fail-over lists; it does not run yet."""
        plan = self.plan
        twin = set_up(
            plan.kind,
            folder / f"{plan.directory.name}-twin",
            plan.hosts,
            port=free_port(),
            names=plan.names,
            tls=plan.tls,
            limits=plan.limits,
        )
        _TESTERS[plan.kind](twin)
        return RunningBroker(twin, epmd_port=free_port(), dist_port=free_port(), java_options=self._java_options)

    @property
    def port(self) -> int:
        return self.plan.port

    @property
    def settings_file(self) -> Path:
        """Of the first host."""
        return self.plan.settings_file(self.plan.hosts[0])

    @property
    def settings(self) -> BrokerSettings:
        return BrokerSettings.load(self.settings_file)

    @property
    def log(self) -> Path:
        return self.plan.directory / "broker.log"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
            "LANG": "C.UTF-8",
            "ACTIVEMQ_OPTS": self._java_options,
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_NODENAME": f"vmwrapper-{self._dist_port}@localhost",
        }

    @property
    def pids(self) -> list[int]:
        """Everything that runs for it."""
        roots = [process for process in (self._process, self._epmd) if process is not None and process.poll() is None]
        return [child.pid for root in roots for child in [psutil.Process(root.pid), *_descendants(root.pid)]]

    @property
    def memory_bytes(self) -> int:
        """Resident memory of all its processes."""
        return sum(psutil.Process(pid).memory_info().rss for pid in self.pids)

    def start(self) -> RunningBroker:
        """Start it and wait until it answers STOMP."""
        assert self._process is None
        if self.plan.kind == "rabbitmq" and self._epmd is None:
            # Erlang's name server would be started as a daemon that outlives the test; as our child it does not.
            epmd = [*END_WITH_US, "epmd", "-address", "127.0.0.1", "-port", str(self._epmd_port)]
            quiet = subprocess.DEVNULL
            self._epmd = subprocess.Popen(epmd, stdin=quiet, stderr=quiet, start_new_session=True)
            _wait_until(lambda: _listens(self._epmd_port), self._epmd, self.log)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*END_WITH_US, str(self.plan.directory / "run")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )
        try:
            _wait_until(self._answers, self._process, self.log)
        except BaseException:
            self.kill()
            raise
        return self

    def _answers(self) -> bool:
        """Whether it logs clients in. That it listens is not enough: RabbitMQ does so before it knows its users, and
        knows those before its exchanges, which come after its queues."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as raw:
                client: socket.socket = raw
                if self.plan.tls:
                    context = ssl.create_default_context(cafile=str(self.plan.ca))
                    client = context.wrap_socket(raw, server_hostname=self.plan.names[0])
                with client:
                    connect = f"CONNECT\naccept-version:1.2\nhost:/\nlogin:{TESTER}\npasscode:{TESTER_PASSCODE}\n\n\0"
                    client.sendall(connect.encode())
                    if not client.recv(4096).startswith(b"CONNECTED"):
                        return False
                    if self.plan.kind != "rabbitmq":
                        return True
                    client.sendall(b"SUBSCRIBE\nid:1\nreceipt:1\ndestination:/exchange/vmwrapper.status\n\n\0")
                    return client.recv(4096).startswith(b"RECEIPT")
        except OSError:
            return False

    def stop(self) -> None:
        """End it in order; with force when it takes too long."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once, as a crash does."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Start it again; the same port, the same configuration."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Let it accept and keep connections, and do nothing."""
        for pid in self.pids:
            os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGCONT)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        group = [psutil.Process(process.pid), *_descendants(process.pid)] if process.poll() is None else []
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        if how is signal.SIGTERM:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        for member in group:  # Erlang's helpers have sessions of their own
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait(STOP_SECONDS)
        _, left = psutil.wait_procs(group, STOP_SECONDS)
        if left:
            raise BrokerFailed(f"processes of the broker did not end: {left}")

    def close(self) -> None:
        """End everything and remove its directory."""
        self.stop()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait(STOP_SECONDS)
            self._epmd = None
        shutil.rmtree(self.plan.directory, ignore_errors=True)

    def __enter__(self) -> RunningBroker:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def free_port() -> int:
    """A port of the loopback that nobody uses now.

    Below those that the system gives to outgoing connections: while a broker is down its port stays free, and a client
    that tries to connect to it cannot happen to be connected to itself. None is given twice, and each of a test run's
    workers has some of its own: whoever asked may listen there seconds later.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    while True:
        port = random.randrange(20_000 + worker % 8, 32_000, 8)
        if port in _GIVEN:
            continue
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        _GIVEN.add(port)
        return port


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    except OSError:
        return False


def _wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """A broker gives no event to wait for, so it is tried."""
    deadline = time.monotonic() + READY_SECONDS
    while not ready():
        ended = process.poll()
        if ended is not None or time.monotonic() > deadline:
            said = log.read_text("utf-8", "replace")[-3000:] if log.exists() else ""
            why = f"ended with {ended}" if ended is not None else f"was not ready in {READY_SECONDS:.0f} s"
            raise BrokerFailed(f"the broker {why}: {said}")
        time.sleep(0.1)


def _tester_of_activemq(plan: Plan) -> None:
    file = plan.directory / "activemq.xml"
    text = file.read_text("utf-8")
    user = f'<authenticationUser username="{TESTER}" password="{TESTER_PASSCODE}" groups="{TESTER}"/>'
    rights = "".join(
        f'<authorizationEntry {kind}="{name}" read="{TESTER}" write="{TESTER}" admin="{TESTER}"/>'
        for kind in ("queue", "topic")
        for name in ("contract.>", "bench.>")
    )
    # Whoever connects makes the broker's advisory topics.
    topics = '<authorizationEntry topic="ActiveMQ.Advisory.>" read="operators" write="operators" admin="tester"/>'
    rights += topics
    text = text.replace("</users>", f"{user}</users>").replace(
        "</authorizationEntries>", f"{rights}</authorizationEntries>"
    )
    file.write_text(text, "utf-8")


def _tester_of_rabbitmq(plan: Plan) -> None:
    import json

    file = plan.directory / "definitions.json"
    value = json.loads(file.read_text("utf-8"))
    value["users"].append({"name": TESTER, "password": TESTER_PASSCODE, "tags": ""})
    everything = {"user": TESTER, "vhost": "/", "configure": ".*", "write": ".*", "read": ".*"}
    value["permissions"].append(everything)
    file.write_text(json.dumps(value), "utf-8")


_TESTERS = {"activemq": _tester_of_activemq, "rabbitmq": _tester_of_rabbitmq}
