"""The host agent of a job: started as our child, or found among the job's own VMmanage tasks.

Either way a task asks for `client()` whenever it looks, and learns in one sentence when the agent is gone.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs

from common.errors import VMwrapperError
from common.files import HOST_AGENT_LOG, HOST_AGENT_STATE, SLOT_IMAGES, endpoints_dir

from ..control_client import ControlClient, ControlError, Endpoint, parse_endpoint, read_endpoint
from ..programs import module_argv
from .events import Events
from .failures import passing_errno
from .host_task import HostTask
from .job import Job, Task
from .log import tail
from .pipes import WatchedPipe
from .resolve import split_command_line
from .tasks import TaskError

READY_DEADLINE_S = 60.0
MANAGED_DEADLINE_S = 180.0  # with a broker in Java that comes up first, on a machine that is busy
SAY_S = 10.0  # how often somebody is told that we still wait
SHUTDOWN_DEADLINE_S = 20.0  # VMs end at once; the client gives us 60 s for everything
TERMINATE_DEADLINE_S = 5.0
MOST_RESTARTS = 3  # in a row: without anything that is kept between them
NO_WINDOW = 0x08000200 if os.name == "nt" else 0  # and a group of its own, as the new session elsewhere
FIRST_RESTART_S = 1.0  # doubled each time; one whose wrapper was killed may still be ending its VMs
_MAX_FIRST_LINE = 65536


class AgentLink(Protocol):
    """A host agent that a task may use."""

    state_directory: str  # where it keeps what outlives it; empty: nothing does
    ready: bool  # it has answered once

    def start(self) -> None:
        """Begin; `client()` says when it is there."""

    def client(self) -> ControlClient | None:
        """The connection, or None while the agent is starting, or starting anew. Raises TaskError when it does not."""

    def gets_on(self) -> None:
        """Work that it did is kept: that it ended before does not count against it any more."""

    def stop(self, keep: bool = False) -> None:
        """End it with its VMs; has a deadline, never raises. `keep`: what has a checkpoint waits for the next."""


def agent_argv() -> list[str]:
    """How to start our own host agent."""
    return [*module_argv("host_agent.main"), "--owned"]


def agent_environment(slot: Path) -> dict[str, str] | None:
    """Environment for it: ours, where our packages are in a checkout, where the images are that the job brings."""
    changes = {}
    root = Path(__file__).resolve().parents[2]
    if (root / "pyproject.toml").is_file():
        paths = [str(root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        changes["PYTHONPATH"] = os.pathsep.join(paths)
    if (slot / SLOT_IMAGES).is_dir():
        changes["VMWRAPPER_IMAGES"] = str(slot / SLOT_IMAGES)
    return {**os.environ, **changes} if changes else None


class _Connection:
    """A client in the loop's selector."""

    def __init__(self, events: Events, page: Callable[[str], None] | None = None) -> None:
        """`page` is told where the volunteer sees what the VMs are doing."""
        self._events = events
        self._page = page
        self.client: ControlClient | None = None

    def open(self, endpoint: Endpoint) -> None:
        try:
            self.client = client = ControlClient.connect(endpoint)
        except ControlError as error:
            raise TaskError(f"the host agent cannot be used: {error}", error.hint, passing=True) from None
        self._events.watch(client, self._readable)
        if self._page is not None:
            client.start("open_page", on_end=self._opened)

    def _opened(self, done: dict[str, Any] | None, error: ControlError | None) -> None:
        url = (done or {}).get("url")
        if url and self._page is not None:
            self._page(str(url))  # without a page the job goes on all the same

    def _readable(self) -> None:
        assert self.client is not None
        self.client.receive()
        if self.client.closed:
            self._events.unwatch(self.client)

    def drop(self) -> None:
        """Forget a connection that is lost."""
        if self.client is not None:
            if not self.client.closed:
                self._events.unwatch(self.client)
            self.client.close()
            self.client = None

    def shut_down(self, keep: bool) -> None:
        """Ask the agent to end everything; whatever comes of it."""
        if self.client is None:
            return
        if not self.client.closed:
            self._events.unwatch(self.client)
            with contextlib.suppress(VMwrapperError):
                self.client.call("shutdown", {"keep": keep}, deadline_s=SHUTDOWN_DEADLINE_S)
        self.client.close()
        self.client = None


class OwnedAgent:
    """Our child: its standard input is its life line, its first line of output says where it listens.

    One that ends by itself is started anew, a few times: its VMs may still run, and are found again.
    """

    def __init__(
        self,
        slot: Path,
        events: Events,
        say: Callable[[str], None],
        argv: Sequence[str] | None = None,
        page: Callable[[str], None] | None = None,
    ) -> None:
        self._slot = slot
        self._events = events
        self._say = say
        self.state_directory = str(slot / HOST_AGENT_STATE)
        self._log = slot / HOST_AGENT_LOG
        self._argv = [*(argv or agent_argv()), "--log", str(self._log), "--state", self.state_directory]
        self._log_start = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._output: WatchedPipe | None = None
        self._end_watch: Callable[[], None] = lambda: None
        self._line = bytearray()
        self._reading = False
        self._connection = _Connection(events, page)
        self._until = 0.0
        self._restarts = 0
        self._restart_at = 0.0
        self._why_gone = TaskError("the host agent was not started")
        self.ready = False

    def start(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        log = os.open(self._log, flags, 0o600)
        try:
            self._log_start = os.fstat(log).st_size
            self._process = subprocess.Popen(
                self._argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self._slot,
                env=agent_environment(self._slot),
                start_new_session=True,  # a Ctrl-C of the terminal is for us; we then tell the agent
                creationflags=NO_WINDOW,
                bufsize=0,
            )
        except OSError as error:
            raise TaskError(f"the host agent cannot be started: {error}", passing=passing_errno(error.errno)) from None
        finally:
            os.close(log)
        self._say(f"host agent started, process {self._process.pid}, log in {HOST_AGENT_LOG}")
        self._until = time.monotonic() + READY_DEADLINE_S
        self._line.clear()
        assert self._process.stdout is not None
        self._output = WatchedPipe(self._process.stdout)
        self._events.watch(self._output, self._read_line)
        self._reading = True
        self._end_watch = self._events.watch_child(self._process.pid)

    def client(self) -> ControlClient | None:
        if self._process is None:
            self._start_anew()
            return None
        if self._is_gone(self._process):
            self._lose(self._process)
            return None
        client = self._connection.client
        if client is not None:
            return client
        if not self._reading and b"\n" in self._line:
            try:
                self._connection.open(self._endpoint())
                self.ready = True
            except TaskError:
                if self._process.poll() is None:
                    raise
                self._lose(self._process)  # it ended between its line and our call
            return self._connection.client
        if time.monotonic() > self._until:
            raise TaskError(f"the host agent was not ready in {READY_DEADLINE_S:g} s{self._tail()}", passing=True)
        return None

    def _is_gone(self, process: subprocess.Popen[bytes]) -> bool:
        client = self._connection.client
        if client is None or not client.closed:
            return process.poll() is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2.0)  # its end and the end of its connection do not come at the same instant
        return True

    def _lose(self, process: subprocess.Popen[bytes]) -> None:
        """It is gone: say why, and when the next one is started. Raises TaskError when there is no next one."""
        self._why_gone = self._gone(process)
        self._connection.drop()
        self._end_process(process, politely=False)
        self._process = None
        if self._restarts >= MOST_RESTARTS:
            raise self._why_gone
        delay = FIRST_RESTART_S * 2**self._restarts
        self._restarts += 1
        if self._restarts == MOST_RESTARTS and not self.ready:
            self._set_state_aside()
        self._restart_at = time.monotonic() + delay
        self._say(f"{self._why_gone}\nstarting it anew in {delay:g} s ({self._restarts} of at most {MOST_RESTARTS})")

    def _set_state_aside(self) -> None:
        """An agent that never came up may be one that cannot read its state; without it there are no VMs to go on with,
        but the job can begin its task again. The VMs are then swept away."""
        state = Path(self.state_directory)
        with contextlib.suppress(OSError):
            state.replace(state.with_name(f"{state.name}.unusable"))
            self._say(f"without the state directory {state.name}, which may be why it does not come up")

    def _start_anew(self) -> None:
        if not self._restarts:
            raise self._why_gone
        if time.monotonic() >= self._restart_at:
            self.start()

    def gets_on(self) -> None:
        if self._process is not None:
            self._restarts = 0

    def stop(self, keep: bool = False) -> None:
        process, self._process = self._process, None
        self._restarts = 0  # and no new one
        if process is not None:
            self._connection.shut_down(keep)
            self._end_process(process, politely=True)

    def _end_process(self, process: subprocess.Popen[bytes], politely: bool) -> None:
        self._stop_reading()
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        for end, deadline_s in (
            (None, SHUTDOWN_DEADLINE_S if politely else 0.0),
            (process.terminate, TERMINATE_DEADLINE_S),
            (process.kill, TERMINATE_DEADLINE_S),
        ):
            if end is not None:
                self._say("the host agent does not end by itself; ending it")
                end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(deadline_s)
                break
        self._end_watch()
        if self._output is not None:
            self._output.close()

    def _read_line(self) -> None:
        assert self._process is not None and self._output is not None
        data = self._output.read()
        self._line += data
        if not data or b"\n" in self._line or len(self._line) > _MAX_FIRST_LINE:
            # It has nothing more to say there; the pipe stays open, so that a later line does not break it.
            self._stop_reading()

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._events.unwatch(self._output)

    def _endpoint(self) -> Endpoint:
        try:
            return parse_endpoint(bytes(self._line).split(b"\n", 1)[0])
        except VMwrapperError as error:
            raise TaskError(f"the host agent said something else than where it listens: {error}") from None

    def _gone(self, process: subprocess.Popen[bytes]) -> TaskError:
        status = process.poll()
        how = "closed its connection" if status is None else f"ended (exit status {status})"
        return TaskError(f"the host agent {how}{self._tail()}", passing=True)

    def _tail(self) -> str:
        lines = tail(self._log, self._log_start)
        return f"; the end of {HOST_AGENT_LOG}:\n{lines}" if lines else f"; {HOST_AGENT_LOG} is empty"


def choose_agent(
    job: Job,
    slot: Path,
    managers: Sequence[HostTask],
    events: Events,
    say: Callable[[str], None],
    argv: Sequence[str] | None = None,
    page: Callable[[str], None] | None = None,
) -> AgentLink:
    """The host agent that the job's VMmanage tasks start, or else one of our own."""
    if any(gives_host_agent(task) for task in job.manage_tasks):
        return ManagedAgent(endpoints_dir, managers, events, say, page=page)
    return OwnedAgent(slot, events, say, argv, page)


def gives_host_agent(task: Task) -> bool:
    """Whether a VMmanage task is a host agent of ours: its program, or a word of its command line, says so."""
    words = [task.application, *split_command_line(task.command_line)]
    names = {word.replace("\\", "/").rpartition("/")[2] for word in words}
    return bool(names & {"vmwrapper-host-agent", "vmwrapper-host-agent.exe", "host_agent.main", "HostMain.py"})


@attrs.define(eq=False)
class ManagedAgent:
    """A host agent that one of the job's VMmanage tasks started: found by its endpoint file and its process."""

    directory: Callable[[], Path]  # where endpoint files are
    managers: Sequence[HostTask]
    events: Events
    say: Callable[[str], None]
    state_directory: str = ""
    ready: bool = False
    page: Callable[[str], None] | None = None
    _since: float = 0.0
    _say_at: float = 0.0
    _connection: Any = None

    def start(self) -> None:
        self._since = time.monotonic()
        self._say_at = SAY_S
        self._connection = _Connection(self.events, self.page)

    def client(self) -> ControlClient | None:
        client: ControlClient | None = self._connection.client
        if client is not None:
            if client.closed:
                raise TaskError("the host agent of the job's VMmanage task is gone", "its own log says why", True)
            return client
        for path in sorted(self.directory().glob("*.json")):
            try:
                endpoint = read_endpoint(path)
            except VMwrapperError:
                continue
            if any(manager.contains(endpoint.pid) for manager in self.managers):
                self._connection.open(endpoint)
                self.ready = True
                return self.client()
        waited = time.monotonic() - self._since
        if waited > MANAGED_DEADLINE_S:
            raise TaskError(
                f"the job's VMmanage tasks gave no host agent in {MANAGED_DEADLINE_S:g} s{self._last_words()}",
                passing=True,
            )
        if waited > self._say_at:
            self._say_at += SAY_S
            self.say(f"waiting for the job's VMmanage tasks: {waited:.0f} s of at most {MANAGED_DEADLINE_S:g} s")
        return None

    def _last_words(self) -> str:
        lines = [f"{manager.task.title} wrote:\n{text}" for manager in self.managers if (text := manager.error_tail())]
        return "".join(f"\n{line}" for line in lines)

    def gets_on(self) -> None:
        pass  # the job starts it, and starts it once

    def stop(self, keep: bool = False) -> None:
        if self._connection is not None:
            self._connection.shut_down(keep)
