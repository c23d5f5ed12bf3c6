"""What runs beside the tasks: BOINC's daemons, the job's VMmanage tasks, and the host agent."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .events import Events
from .host_task import HostTask
from .tasks import TaskError

if TYPE_CHECKING:
    from .agent_process import AgentLink

GRACE_S = 10.0  # for a VMmanage task to end its virtual machines


class Services:
    """Started before the tasks, watched while they run, ended after them whatever happened."""

    def __init__(
        self,
        daemons: Sequence[HostTask],
        managers: Sequence[HostTask],  # empty when no task uses a VM
        agent: AgentLink | None,
        events: Events,
        say: Callable[[str], None],
    ) -> None:
        self.daemons = daemons
        self.managers = managers
        self.agent = agent
        self.events = events
        self.say = say
        self._started: list[HostTask] = []
        self._noted: set[int] = set()
        self._needed: set[int] = set()  # VMmanage tasks that ran when VMs began to be used

    def start(self) -> None:
        """Start all of them. Raises TaskError; `stop()` then ends those that did start."""
        for service in (*self.daemons, *self.managers):
            service.run()
            self._started.append(service)
            self.say(f"started {service.task.title}")
        if self.agent is not None:
            self.agent.start()

    def follow(self, suspended: bool) -> None:
        """Daemons compute too, so they are suspended with the tasks; what manages VMs has to go on."""
        for service in self._started:
            if service in self.daemons:
                (service.stop if suspended else service.resume)()

    def cpu_seconds(self, now: bool = False) -> float:
        """CPU time of the daemons since they were started."""
        return sum(service.cpu_seconds(now) for service in self.daemons)

    def check(self) -> None:
        """Raises TaskError when a VMmanage task failed, or ended while VMs are in use.

        One that only prepares something ends with 0 before that. A daemon's end is noted; BOINC's wrapper ignores it.
        """
        in_use = self.agent is not None and self.agent.ready
        for service in self._started:
            end = service.poll()
            if end is None:
                if in_use and service in self.managers:
                    self._needed.add(id(service))
                continue
            if id(service) in self._noted:
                continue
            self._noted.add(id(service))
            if service in self.daemons or (end.ok and id(service) not in self._needed):
                self.say(f"{service.task.title} {end.sentence}")
                continue
            lines = service.error_tail()
            more = f":\n{lines}" if lines else ""
            raise TaskError(f"{service.task.title} {end.sentence}, but the tasks need it{more}", passing=True)

    def stop(self, keep: bool = False) -> None:
        """End everything: the agent (it ends its VMs), then VMmanage tasks politely, then what is left."""
        if self.agent is not None:
            self.agent.stop(keep)
        managers = [service for service in self._started if service in self.managers]
        for service in managers:
            service.terminate()
        until = time.monotonic() + GRACE_S
        while any(service.poll() is None for service in managers) and time.monotonic() < until:
            self.events.wait(0.2)
        for service in reversed(self._started):
            service.kill()
        self._started.clear()
