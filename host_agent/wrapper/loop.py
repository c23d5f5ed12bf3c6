"""Tasks, from their start to their end, while the client's wishes are followed and it is told how far we are."""

from __future__ import annotations

import time
from pathlib import Path

from .boinc.runtime import SERVICE_S, Leave, Runtime, Status
from .events import Events
from .log import Log
from .progress import Progress
from .services import Services
from .sporadic import SporadicFiles
from .step import Step
from .vm_wishes import VmWishes


class QuitError(Exception):
    """Not an error of the job: the client, or a signal, wants us to end now and be started again later."""


class TaskLoop:
    """Runs the steps of a job."""

    def __init__(
        self,
        slot: Path,
        runtime: Runtime,
        events: Events,
        log: Log,
        progress: Progress,
        services: Services,
        wishes: VmWishes,
        sporadic: SporadicFiles | None = None,
    ) -> None:
        self.slot = slot
        self.runtime = runtime
        self.events = events
        self.log = log
        self.progress = progress
        self.services = services
        self.wishes = wishes
        self.sporadic = sporadic
        self.status = Status()

    def run(self, step: Step) -> None:
        """Run tasks until all have ended, or one has failed. Raises QuitError and TaskError.

        Nothing of them runs any more then.
        """
        try:
            self.follow_client(step)
            step.begin()
            while not step.over():
                self.services.check()
                self.follow_client(step)
                self.progress.report(step.now(), self.status)
                step.keep()
                if step.enforce_limits():
                    continue  # a task on the host has ended now; one in a VM says so soon
                self._wait(step.wait_s())
        except QuitError:
            if self.status.leave is not Leave.ABORT:
                step.leave()
            raise
        finally:
            step.end(self.status)

    def _wait(self, timeout_s: float) -> None:
        """Until something happens, at most so long. A client's message wakes nobody, so it is looked for in between."""
        until = time.monotonic() + timeout_s
        left = timeout_s
        while left > 0 and not self.events.wait(min(left, SERVICE_S)) and not self.runtime.service():
            left = until - time.monotonic()

    def follow_client(self, step: Step | None = None) -> None:
        """Suspend, resume or end the tasks as the client, or a signal, says. Raises QuitError."""
        self.status = status = self.runtime.poll()
        self.wishes.follow_network(status)
        if self.events.quit_signal:
            raise QuitError(self.events.quit_signal)
        if status.quit_reason:
            raise QuitError(status.quit_reason)
        if status.reread:
            self.wishes.follow(self.runtime.init_data())
        if self.sporadic is not None:
            self.sporadic.tick(status)
        self.progress.trickles.follow_project()
        clock = self.progress.clock
        clock.tick()
        if status.suspended == clock.running:
            clock.running = not status.suspended
            self.log.say("suspended by the client" if status.suspended else "resumed by the client")
        self.services.follow(status.suspended)
        for running in step.running if step is not None else ():  # also one that begins while the client wants quiet
            (running.stop if status.suspended else running.resume)()
