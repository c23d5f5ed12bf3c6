"""The host agent: `build_host_agent` makes every part and connects it to the others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, maybeDeferred, succeed
from twisted.internet.interfaces import IDelayedCall, IProtocolFactory
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.threadpool import ThreadPool

from common import messages
from common.errors import VMwrapperError

from . import exchange
from .broker.access import BrokerAccess, HostLink, OwnBroker
from .broker.settings import BrokerSettings
from .checkpoints import Checkpoints
from .chirp import Chirp
from .commands import Commands
from .commits import Commits
from .control import ControlServer, Endpoint
from .copies import Copies
from .doctor import look
from .events import EventLog, Happened
from .exchange import Exchange
from .files_service import FilesService
from .guests import Guest, Guests
from .hypervisors.base import Hypervisor
from .ledger import grace_time, some_wait, sweep
from .observe import Observation
from .once import Once
from .operations import Operations
from .requests import Requests
from .state import AgentState
from .status import StatusReporter
from .virtual_machine import BROKER_PORT, FILES_PORT
from .vms import Fate, VirtualMachines
from .volunteer_page import VolunteerPage

LEAVE_DEADLINE = 8.0  # seconds for VMs that go on without us


def build_host_agent(
    reactor: Any,
    hypervisor: Hypervisor,
    state: AgentState,
    stopped: Callable[[], None],
    external: BrokerSettings | None = None,
    chirp_tools: Path | None = None,
) -> HostAgent:
    """The map of the program: every part of a host agent and who talks to whom.

    `stopped` is called when the agent was asked to end and has ended everything it had.
    The broker is the embedded one, or an `external` one. `chirp_tools`: where cctools are, if not on PATH.
    """
    broker = _external_broker(reactor, external) if external is not None else OwnBroker(reactor, state.agent_id)
    files = FilesService(reactor)
    agent = HostAgent(reactor, hypervisor, state, broker, stopped)

    disk = ThreadPool(minthreads=0, maxthreads=1, name="outbox")  # its own: those of copies may be busy for long
    disk.start()
    reactor.addSystemEventTrigger("during", "shutdown", disk.stop)
    commits = Commits(reactor, state.outbox, lambda work: deferToThreadPool(reactor, disk, work))
    commands = Commands(reactor, state.outbox, commits, state.output)
    copies = Copies(files, state.outbox, commits)
    requests = Requests(commands, copies)
    guests = Guests(reactor, broker.host, agent.send, requests, new_epoch=lambda guest: vms.keep(guest))

    def services_for(guest: Guest, directory: Path) -> dict[int, IProtocolFactory]:
        port_of_files = files.factory_for(guest.id, Exchange(directory / exchange.NAME))
        return {BROKER_PORT: broker.service_for(guest.identity.login), FILES_PORT: port_of_files}

    checkpoints = Checkpoints(reactor, state, guests, requests)
    vms = VirtualMachines(reactor, broker, hypervisor, guests, requests, state, checkpoints, services_for)
    events = EventLog(reactor)
    observation = Observation(vms, commands, copies, events, broker.report)
    page = VolunteerPage(reactor, observation)
    looking = {**observation.calls, "open_page": page.open}
    chirp = Chirp(reactor, chirp_tools)
    operations = Operations(reactor, vms, guests, commands, copies, agent.shut_down, chirp, looking)
    control = ControlServer(reactor, state.agent_id, operations)
    agent.wire(guests, vms, requests, commits, control, events)
    agent.observation, agent.page = observation, page
    agent.operations = operations
    if external is not None and external.status:
        agent.status = StatusReporter(reactor, broker.host, state.agent_id, observation, events, agent.send)
    return agent


def _external_broker(reactor: Any, settings: BrokerSettings) -> BrokerAccess:
    # Imported late: what connects to brokers takes memory, and the embedded one needs none of it.
    from .broker.external import ExternalBroker

    return ExternalBroker(reactor, settings)


class HostAgent:
    """The parts' common life: start, messages from the broker, end."""

    _log = Logger()

    def __init__(
        self,
        reactor: Any,
        hypervisor: Hypervisor,
        state: AgentState,
        broker: BrokerAccess,
        stopped: Callable[[], None],
    ) -> None:
        self.id = state.agent_id
        self._hypervisor = hypervisor
        self._state = state
        self._reactor = reactor
        self._broker = broker
        self._stopped = stopped
        self._link: HostLink | None = None
        self._arrivals: list[Deferred[None]] = []  # of those who wait for the broker
        # For those who serve them besides the control interface.
        self.observation: Observation
        self.page: VolunteerPage
        self.operations: Operations
        self.status: StatusReporter | None = None  # where others could read it
        self._fate = Fate.END
        self._looking: Deferred[None] = succeed(None)
        self._sweeps_again: IDelayedCall | None = None
        self._ending = False
        self._end = Once(self._shut_down)

    def wire(
        self,
        guests: Guests,
        vms: VirtualMachines,
        requests: Requests,
        commits: Commits,
        control: ControlServer,
        events: EventLog,
    ) -> None:
        self._guests, self._vms, self._requests, self._control = guests, vms, requests, control
        self._commits = commits
        self.events = events

    async def start(self, broker_deadline: float = 0.0) -> Endpoint:
        """Take up what an earlier agent left, open the broker, connect to it, listen for clients; says where.

        With a deadline in seconds, nobody is told where before the broker has answered.
        """
        self.events.start()
        self._vms.expect_all()
        self._requests.load(self._guests.get)
        self._link = self._broker.link([messages.host_queue(self._broker.host), messages.PRESENCE], events=self)
        self._link.start()
        arrival = self._first_connection(broker_deadline) if broker_deadline else None
        await self._vms.adopt_all()
        # Beside our own work: a hypervisor may take minutes. Nobody waits for the end of it, and it may be cut short.
        self._begin_sweep()
        self._looking = Deferred.fromCoroutine(self._look())
        self._looking.addErrback(lambda failure: failure.trap(CancelledError))
        if arrival is not None:
            await arrival
        return self._control.listen()

    async def _look(self) -> None:
        """Say what is missing on this host, before somebody has to ask why a VM is slow or does not start."""
        for each in await look(self._hypervisor, Path.cwd()):
            if not each.met:
                words = f"{each.name}: {each.found}" + (f"; {each.remedy}" if each.remedy else "")
                self._log.warn("this host: {words}", words=words)
                if each.fatal:
                    self._vms.missing.append(words)

    def _begin_sweep(self) -> None:
        self._sweeps_again = None
        threading.Thread(target=self._sweep, name="sweep", daemon=True).start()

    def _sweep(self) -> None:
        """In a thread of its own."""
        try:
            said = [f"left by one that died: {sentence}" for sentence in sweep()]
            if some_wait():
                self._reactor.callFromThread(self._sweep_again)
        except Exception as error:
            said = [f"what others left cannot be removed: {error}"]
        for sentence in said:
            self._reactor.callFromThread(self._log.info, "{sentence}", sentence=sentence)

    def _sweep_again(self) -> None:
        """When what waits for its next host agent has waited long enough."""
        if not self._ending:
            self._sweeps_again = self._reactor.callLater(grace_time() + 1, self._begin_sweep)

    def _first_connection(self, deadline: float) -> Deferred[None]:
        def too_late(result: object, seconds: float) -> None:
            raise VMwrapperError(f"the broker did not answer within {seconds:.0f} s", "its own log may say why")

        arrival: Deferred[None] = Deferred()
        self._arrivals.append(arrival)
        return arrival.addTimeout(deadline, self._reactor, too_late)

    def send(self, destination: str, body: bytes) -> None:
        if self._link is not None:
            self._link.send(destination, body)

    def broker_connected(self) -> None:
        self._log.info("{host} is connected to its broker", event=Happened.BROKER_CONNECTED, host=self._broker.host)
        self._broker.connected()
        self._guests.broker_connected()
        if self.status is not None:
            self.status.start()
        arrivals, self._arrivals = self._arrivals, []
        for arrival in arrivals:
            arrival.callback(None)

    def broker_disconnected(self, reason: str) -> None:
        """The link to the broker tries again by itself; guests are heard again when it succeeds."""
        self._guests.broker_lost()
        self._log.warn(
            "{host} has lost its broker: {reason}", event=Happened.BROKER_LOST, host=self._broker.host, reason=reason
        )

    def broker_message(self, destination: str, body: bytes) -> None:
        if destination == messages.PRESENCE:
            self._guests.beacon(body)
        else:
            self._guests.received(body)

    def shut_down(self, fate: Fate = Fate.END) -> Deferred[None]:
        """End, with every VM and what this agent made unless `fate` keeps it; then tell `stopped`."""
        if fate is not Fate.END:
            self._fate = fate
        return self._end()

    def owner_gone(self) -> Deferred[None]:
        """Whoever started us ended without a word: its successor may want our VMs."""
        return self.shut_down(Fate.LEAVE)

    async def _shut_down(self) -> None:
        self._ending = True
        self._looking.cancel()
        if self._sweeps_again is not None:
            self._sweeps_again.cancel()
        for part, end in (
            ("confirmations", self._commits.stop),
            ("virtual machines", self._end_vms),
            ("guests", self._guests.stop),
            ("status", self.status.stop if self.status is not None else None),
            ("connection to the broker", self._link.stop if self._link is not None else None),
            ("broker", self._broker.close),
            ("control interface", self._control.stop),
            ("page", self.page.stop),
            ("events", self.events.stop),
            ("state", lambda: self._state.close(remove=not self._state.vms)),
        ):
            try:
                if end is not None:
                    await maybeDeferred(end)
            except Exception:
                self._log.failure("could not end its {part} cleanly", part=part)
        # After the answer to whoever asked for the end has been written.
        self._reactor.callLater(0.05, self._stopped)

    def _end_vms(self) -> Deferred[None]:
        ended = Deferred.fromCoroutine(self._vms.stop_all(self._fate))
        # A successor that is there already waits for us; what we cannot let go of in order, our end lets go of.
        return ended.addTimeout(LEAVE_DEADLINE, self._reactor) if self._fate is Fate.LEAVE else ended
