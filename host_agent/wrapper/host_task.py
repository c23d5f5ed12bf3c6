"""A task on the host: its names resolved, its files opened, its program started, watched and ended."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from ..programs import script_argv
from .failures import passing_errno
from .job import Task, TaskKind
from .log import STDERR_FILE, tail
from .resolve import PYTHON_THEN, PYTHON_TODAY, Macros, application_path, command_words, environment, resolve_path
from .tasks import ENDED_EARLY, TIME_LIMIT, Left, TaskEnd, TaskError, TaskState, read_fraction

CPU_INTERVAL_S = 10.0  # looking through all processes is not free


class ExitStatus(NamedTuple):
    """How a process ended."""

    exit_code: int
    signal: str = ""


class ProcessSpec(NamedTuple):
    """What it takes to start one program."""

    program: str  # absolute
    argv: Sequence[str]
    directory: Path
    environment: Mapping[str, str] | None  # None: ours
    stdin: Path | None  # None: nothing to read
    stdout: Path  # both are appended to
    stderr: Path
    priority: int = 0  # BOINC's 1 (lowest) to 5; 0: as ours
    multi_process: bool = False  # SIGTSTP goes to all of its processes, not to the first alone

    @contextmanager
    def open_files(self) -> Iterator[tuple[int, int, int]]:
        """Descriptors for the child, closed again afterwards. Raises OSError."""
        with ExitStack() as stack:
            descriptors = []
            append = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            for name, flags in ((self.stdin or os.devnull, os.O_RDONLY), (self.stdout, append), (self.stderr, append)):
                descriptors.append(os.open(name, flags, 0o644))
                stack.callback(os.close, descriptors[-1])
            yield descriptors[0], descriptors[1], descriptors[2]


class Process(Protocol):
    """A started program with all that it starts; one class for each kind of operating system."""

    pid: int

    def fileno(self) -> int:
        """Readable, for a selector, when there is something to `receive()`."""

    def receive(self) -> None: ...

    def poll(self) -> ExitStatus | None: ...

    def suspend(self) -> None: ...

    def resume(self) -> None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...

    def close(self) -> None:
        """Once it has ended and nobody watches it."""

    def contains(self, pid: int) -> bool: ...

    def cpu_seconds(self) -> float: ...


def start_process(spec: ProcessSpec, keep_tree: bool = False, use_tstp: bool = False) -> Process:
    """Start a program with this system's way of doing it. Raises OSError."""
    if os.name == "nt":
        from .host_task_windows import WindowsProcess

        return WindowsProcess(spec)
    from .host_task_posix import PosixProcess

    return PosixProcess(spec, keep_tree, use_tstp)


class Watch(NamedTuple):
    """What a host task needs from the loop: to be woken at its end, a note of what runs, and a line in the log."""

    readable: Callable[[Process, Callable[[], None]], Callable[[], None]]  # returns the end of the watch
    started: Callable[[int], None]
    ended: Callable[[int], None]
    say: Callable[[str], None] = lambda _text: None


class HostTask:
    """A `RunningTask` on the host. `service`: it runs beside the tasks, and may leave processes behind."""

    def __init__(
        self,
        task: Task,
        slot: Path,
        macros: Macros,
        watch: Watch,
        extra_words: tuple[str, ...] = (),
        client_priority: int | None = 0,  # 1 to 5; 0: the client has no wish; None: it wants no change of ours
        service: bool = False,
        use_tstp: bool = False,
        state: TaskState = TaskState.READY,
    ) -> None:
        self.task = task
        self.slot = slot
        self.macros = macros
        self.watch = watch
        self.extra_words = extra_words
        self.client_priority = client_priority
        self.service = service
        self.use_tstp = use_tstp
        self.state = state
        self._process: Process | None = None
        self._suspended: bool = False
        self._on_purpose: str = ""
        self._cpu_s: float = 0.0
        self._cpu_measured: float = 0.0
        self._stderr_start: int = 0
        self._end_watch: Callable[[], None] | None = None

    def check(self) -> None:
        """Whether everything that it needs is there. Raises TaskError; starts nothing."""
        check_files(self.task, self.slot, self.macros)

    def run(self) -> None:
        spec = self._spec()
        if self.task.application == PYTHON_THEN and Path(spec.program).name == PYTHON_TODAY:
            self.watch.say(f"{self.task.title}: this host has no {PYTHON_THEN}, so it is run by {spec.program}")
        if self.task.fraction_done_filename:
            (self.slot / self.task.fraction_done_filename).unlink(missing_ok=True)
        if self.task.stderr_filename and spec.stderr.exists():
            self._stderr_start = spec.stderr.stat().st_size
        try:
            self._process = start_process(spec, keep_tree=self.service, use_tstp=self.use_tstp)
        except OSError as error:
            passing = passing_errno(error.errno)
            raise TaskError(
                f"{self.task.title} could not be started: {_os_reason(error, spec)}", passing=passing
            ) from None
        self.state = TaskState.RUNNING
        self._cpu_measured = time.monotonic()
        self.watch.started(self._process.pid)
        self._end_watch = self.watch.readable(self._process, self._process.receive)

    def poll(self) -> TaskEnd | None:
        if self._process is None:
            return None
        status = self._process.poll()
        if status is None:
            return None
        self._ended()
        return TaskEnd(status.exit_code, status.signal, self._on_purpose)

    def stop(self) -> None:
        if self.state is TaskState.RUNNING and self._process and not self._suspended:
            self._suspended = True
            self._process.suspend()

    def resume(self) -> None:
        if self.state is TaskState.RUNNING and self._process and self._suspended:
            self._suspended = False
            self._process.resume()

    def expire(self, why: str = TIME_LIMIT) -> None:
        self._on_purpose = why
        self.kill()

    def ask_to_end(self) -> None:
        self._on_purpose = ENDED_EARLY
        self.terminate()

    def leave(self) -> Left:
        return lambda _until: None  # it cannot be kept

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._ended()
            self._process.close()
            self.watch.ended(self._process.pid)

    def terminate(self) -> None:
        """Ask it to end by itself; `kill()` must follow."""
        if self._process and self.state is TaskState.RUNNING:
            self.resume()
            self._process.terminate()

    def contains(self, pid: int) -> bool:
        """Whether a process belongs to this task."""
        return self._process is not None and self._process.contains(pid)

    def cpu_seconds(self, now: bool = False) -> float:
        age = time.monotonic() - self._cpu_measured
        if self._process and (now or self.state is TaskState.DONE or age >= CPU_INTERVAL_S):
            self._cpu_measured = time.monotonic()
            self._cpu_s = self._process.cpu_seconds()
        return self._cpu_s

    @property
    def counted_s(self) -> float:
        return 0.0

    def kept(self, wanted: bool) -> float | None:
        return None  # it saves its own state, if anybody does

    def fraction(self) -> float:
        if self.state is TaskState.DONE:
            return 1.0
        name = self.task.fraction_done_filename
        return read_fraction(self.slot / name) if name else 0.0

    def other_pid(self) -> int:
        return 0  # all of its processes are below ours

    def traffic(self) -> tuple[float, float]:
        return (0.0, 0.0)  # its program may tell the client itself

    def error_tail(self) -> str:
        name = self.task.stderr_filename
        return tail(resolve_path(self.slot, name), self._stderr_start) if name else ""

    def _ended(self) -> None:
        if self.state is not TaskState.DONE:
            self.state = TaskState.DONE
            if self._end_watch:
                self._end_watch()
        if self._process and not self.service:
            self._process.close()
            self.watch.ended(self._process.pid)

    def _spec(self) -> ProcessSpec:
        task, slot = self.task, self.slot
        self.check()
        program = application_path(task, slot, self.macros)
        assert program is not None
        own = slot / STDERR_FILE
        directory = slot / self.macros.expand(task.exec_dir) if task.exec_dir else slot
        start = script_argv(str(program)) or [str(program)]
        return ProcessSpec(
            program=start[0],
            argv=[*start, *command_words(task, slot, self.macros, self.extra_words)],
            directory=directory,
            environment=environment(task, self.macros) if task.setenv else None,
            stdin=resolve_path(slot, task.stdin_filename) if task.stdin_filename else None,
            stdout=resolve_path(slot, task.stdout_filename) if task.stdout_filename else own,
            stderr=resolve_path(slot, task.stderr_filename) if task.stderr_filename else own,
            priority=self._priority(),
            multi_process=task.multi_process,
        )

    def _priority(self) -> int:
        if self.client_priority is None:
            return 0
        if self.task.kind is not TaskKind.TASK:
            return self.task.priority
        return self.client_priority or self.task.priority or 1  # BOINC's default is the lowest


def check_files(task: Task, slot: Path, macros: Macros) -> None:
    """The files of a host task that must be there when it starts. Raises TaskError."""
    program = application_path(task, slot, macros)
    if program is None:
        where = "in the slot" if "/" in task.application else "in the slot or on PATH"
        raise TaskError(f"{task.title}: there is no program {task.application!r} {where}", f"the slot is {slot}")
    if not os.access(program, os.X_OK):
        raise TaskError(
            f"{task.title}: {task.application!r} is not executable",
            f"chmod +x {program}   (a script also needs a first line such as #!/usr/bin/env python3)",
        )
    name = task.stdin_filename
    if name and not resolve_path(slot, name).is_file():
        raise TaskError(f"{task.title}: there is no <stdin_filename> {name!r} in the slot", f"the slot is {slot}")
    if task.exec_dir and not (slot / macros.expand(task.exec_dir)).is_dir():
        raise TaskError(f"{task.title}: <exec_dir> {task.exec_dir!r} is not a directory", f"the slot is {slot}")


def _os_reason(error: OSError, spec: ProcessSpec) -> str:
    if error.errno == 8:  # ENOEXEC: neither a program nor a script with #!
        return f"{spec.program} is not a program of this computer, and has no #! line"
    name = f"{error.filename}: " if error.filename else ""
    return f"{name}{error.strerror or error}"
