"""The host agent: `build_host_agent` makes every part and connects it to the others."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import attrs
from twisted.internet.defer import maybeDeferred
from twisted.internet.interfaces import IListeningPort, IProtocolFactory
from twisted.logger import Logger

from common import messages
from common.broker_link import BrokerAddress, BrokerLink, Credentials

from .broker.embedded import EmbeddedBroker
from .broker.principals import Principal
from .commands import Commands
from .control import ControlServer, Endpoint
from .copies import Copies
from .files_service import FilesService
from .guests import Guest, Guests
from .hypervisors.base import Hypervisor
from .ledger import sweep
from .once import Once
from .operations import Operations
from .requests import Requests
from .state import AgentState
from .vms import BROKER_PORT, FILES_PORT, VirtualMachines

LOOPBACK = "127.0.0.1"


def build_host_agent(reactor: Any, hypervisor: Hypervisor, state: AgentState, stopped: Callable[[], None]) -> HostAgent:
    """The map of the program: every part of a host agent and who talks to whom.

    `stopped` is called when the agent was asked to end and has ended everything it had.
    """
    agent_id = state.agent_id
    logins = Logins(agent_id)
    broker = EmbeddedBroker(reactor, authenticate=logins.authenticate)
    files = FilesService(reactor)
    agent = HostAgent(reactor, state, broker, logins, stopped)

    commands = Commands(reactor, state.outbox, state.output)
    copies = Copies(files, state.outbox)
    requests = Requests(commands, copies)
    guests = Guests(reactor, agent_id, agent.send, requests, new_epoch=lambda guest: vms.keep(guest))
    logins.guests = guests

    def services_for(guest: Guest) -> dict[int, IProtocolFactory]:
        return {BROKER_PORT: broker.factory_for(guest.id), FILES_PORT: files.factory_for(guest.id)}

    vms = VirtualMachines(reactor, agent_id, hypervisor, guests, requests, state, services_for)
    operations = Operations(reactor, vms, guests, commands, copies, agent.shut_down)
    control = ControlServer(reactor, agent_id, operations)
    agent.wire(guests, vms, requests, control)
    return agent


@attrs.define
class Logins:
    """Who may log in to the embedded broker: this agent itself and the guests that it expects."""

    host: str
    passcode: str = attrs.field(factory=lambda: secrets.token_urlsafe(32), repr=False)
    guests: Guests | None = None

    def authenticate(self, login: str, passcode: str) -> Principal | None:
        if login == self.host:
            own = Principal.with_rules(login, send=["/queue/vmwrapper.guest.*"], subscribe=["*"])
            return own if secrets.compare_digest(passcode.encode(), self.passcode.encode()) else None
        guest = self.guests.get(login) if self.guests is not None else None
        if guest is None or not secrets.compare_digest(passcode.encode(), guest.identity.passcode.encode()):
            return None
        return Principal.with_rules(
            login,
            send=[messages.host_queue(self.host), messages.PRESENCE],
            subscribe=[messages.guest_queue(login)],
        )


class HostAgent:
    """The parts' common life: start, messages from the broker, end."""

    _log = Logger()

    def __init__(
        self, reactor: Any, state: AgentState, broker: EmbeddedBroker, logins: Logins, stopped: Callable[[], None]
    ) -> None:
        self.id = state.agent_id
        self._state = state
        self._reactor = reactor
        self._broker = broker
        self._logins = logins
        self._stopped = stopped
        self._port: IListeningPort | None = None
        self._link: BrokerLink | None = None
        # End every VM and remove what this agent made; then tell `stopped`.
        self.shut_down = Once(self._shut_down)

    def wire(self, guests: Guests, vms: VirtualMachines, requests: Requests, control: ControlServer) -> None:
        self._guests, self._vms, self._requests, self._control = guests, vms, requests, control

    async def start(self) -> Endpoint:
        """Take up what an earlier agent left, open the broker, connect to it, listen for clients; says where."""
        self._vms.expect_all()
        self._requests.load(self._guests.get)
        self._port = await self._broker.listen(LOOPBACK, 0)
        assert self._port is not None
        address: Any = self._port.getHost()
        self._link = BrokerLink(
            self._reactor,
            [BrokerAddress(LOOPBACK, address.port)],
            Credentials(self.id, self._logins.passcode),
            [messages.host_queue(self.id), messages.PRESENCE],
            events=self,
        )
        self._link.start()
        await self._vms.adopt_all()
        for sentence in sweep():
            self._log.info("left by an agent that died: {sentence}", sentence=sentence)
        return self._control.listen()

    def send(self, destination: str, body: bytes) -> None:
        if self._link is not None:
            self._link.send(destination, body)

    def broker_connected(self) -> None:
        self._guests.broker_connected()

    def broker_disconnected(self, reason: str) -> None:
        """The link to the broker tries again by itself; guests are heard again when it succeeds."""

    def broker_message(self, destination: str, body: bytes) -> None:
        if destination == messages.PRESENCE:
            self._guests.beacon(body)
        else:
            self._guests.received(body)

    async def _shut_down(self) -> None:
        for part, end in (
            ("virtual machines", self._vms.stop_all),
            ("guests", self._guests.stop),
            ("connection to the broker", self._link.stop if self._link is not None else None),
            ("broker", self._broker.stop),
            ("control interface", self._control.stop),
            ("state", lambda: self._state.close(remove=not self._state.vms)),
        ):
            try:
                if end is not None:
                    await maybeDeferred(end)
            except Exception:
                self._log.failure("could not end its {part} cleanly", part=part)
        # After the answer to whoever asked for the end has been written.
        self._reactor.callLater(0.05, self._stopped)
