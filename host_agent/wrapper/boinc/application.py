"""The whole of a BOINC application in Python that computes in steps: `run(main)`.

def main(app: Application) -> int:
    ...
    for number in range(start, 1000):
        compute(number)
        app.step(number / 1000)  # waits while the client wants quiet, ends the program when it wants it to go
        if app.time_to_checkpoint():
            with app.checkpoint():
                ...  # write what the next start needs
    return 0

sys.exit(run(main))
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from . import connect
from .runtime import SERVICE_S, SLOT_BUSY_DELAY_S, InitData, Leave, Runtime, SlotBusyError

ABORTED_BY_CLIENT = 194  # BOINC's EXIT_ABORTED_BY_CLIENT


class LeaveNowError(Exception):
    """The client wants the application gone; `run()` ends it. Not to be caught, except to pass it on."""

    def __init__(self, leave: Leave) -> None:
        super().__init__(leave.value)
        self.leave = leave


class TemporaryExitError(Exception):
    """Raised by `main`: it cannot go on now, start it again after `delay_s` seconds."""

    def __init__(self, delay_s: int, reason: str) -> None:
        super().__init__(reason)
        self.delay_s = delay_s


class Application:
    """What `main` gets. Not for threads: all calls from one."""

    def __init__(self, runtime: Runtime, data: InitData) -> None:
        self.runtime = runtime
        self.data = data
        self.checkpoint_cpu_s = data.wu_cpu_s
        self.fraction = 0.0

    def step(self, fraction: float | None = None) -> None:
        """Between two pieces of work, as often as you like. Raises LeaveNowError."""
        if fraction is not None:
            self.fraction = fraction
        self.runtime.report(self.cpu_seconds(), self.checkpoint_cpu_s, self.fraction)
        while True:
            status = self.runtime.poll()
            if status.leave is not Leave.STAY:
                raise LeaveNowError(status.leave)
            if status.reread:
                self.data = self.runtime.init_data()
            if not status.suspended:
                return
            time.sleep(SERVICE_S)

    def time_to_checkpoint(self) -> bool:
        """Whether the volunteer's interval between checkpoints is over."""
        return self.runtime.time_to_checkpoint()

    @contextmanager
    def checkpoint(self) -> Iterator[None]:
        """Around the writing of a checkpoint. When it fails, the client is told of none."""
        yield
        self.checkpoint_cpu_s = self.cpu_seconds()
        self.runtime.checkpoint_completed()

    def resolve(self, name: str) -> Path:
        """The path of an input or output file."""
        return Path(self.runtime.resolve(name))

    def cpu_seconds(self) -> float:
        """CPU time of the job, over all starts: ours and that of the children we waited for."""
        times = os.times()
        return self.data.wu_cpu_s + times.user + times.system + times.children_user + times.children_system


def run(main: Callable[[Application], int], slot: Path | None = None) -> int:
    """Run an application from its first to its last word to the client. Returns the status to exit with."""
    runtime = connect(slot or Path.cwd())
    try:
        try:
            app = Application(runtime, runtime.init())
        except SlotBusyError as error:
            return runtime.temporary_exit(SLOT_BUSY_DELAY_S, str(error))
        try:
            status = main(app)
        except LeaveNowError as error:
            return ABORTED_BY_CLIENT if error.leave is Leave.ABORT else 0
        except TemporaryExitError as error:
            return runtime.temporary_exit(error.delay_s, str(error))
        except Exception:
            traceback.print_exc(file=sys.stderr)  # the client sends it to the project
            status = 1
        runtime.report(app.cpu_seconds(), app.checkpoint_cpu_s, 1.0 if status == 0 else app.fraction)
        return runtime.finish(status)
    finally:
        runtime.close()
