"""The guest agent: `build_guest_agent` makes every part and connects it to the others.

CONNECTING ──broker──▶ GREETING ──WELCOME, opened──▶ SERVING ──broker lost──▶ CONNECTING
                          ▲                              │
                          └─WELCOME, not opened: another epoch, or a host agent that has started anew

any ──keeper lost, or other settings──▶ ENDING
"""

from __future__ import annotations

import enum
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from common import messages
from common.broker_link import BrokerLink
from common.config import GuestConfig
from common.errors import ProtocolError
from common.files import keeper_socket
from common.link import Link, new_session
from common.messages import Confirm, CopyIn, CopyOut, Envelope, Hello, Message, Ping, Pong, Run, Signal, Welcome

from . import VERSION
from .copying import Copier
from .ground import Ground
from .journal import Journal
from .presence import Presence
from .runner import Runner

HELLO_AGAIN = 2.0  # seconds without a WELCOME; the wait grows up to HELLO_MOST
HELLO_MOST = 30.0
KEEPER_FAREWELL = 0.5  # seconds in which the host may hear what was lost with the keeper


def build_guest_agent(reactor: Any, config: GuestConfig, home: Path, ground: Ground | None = None) -> GuestAgent:
    """The map of the program: every part of a guest agent and who talks to whom."""
    ground = ground or Ground.of(home)
    agent = GuestAgent(reactor, config, home)
    queue = messages.guest_queue(config.credentials.login)
    broker = BrokerLink(reactor, config.brokers, config.credentials, [queue], events=agent, dialect=config.dialect)
    link = Link(reactor, new_session(), agent.transmit, agent.deliver)
    journal = ground.journal
    journal.lasting = config.boots_again
    runner = Runner(reactor, home, journal, link, agent.keeper_lost, _environment(config), ground.accounts)
    copier = Copier(reactor, home, config.files, journal, link)
    presence = Presence(reactor, config, runner.running, agent.beacon)
    agent.wire(broker, link, journal, runner, copier, presence)
    runner.connect(reactor, keeper_socket(home), ready=broker.start, connected=ground.keeper)
    return agent


def _environment(config: GuestConfig) -> dict[str, str]:
    """What all programs here are given besides: the way to the network, where there is one."""
    names = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    return dict.fromkeys(names, config.proxy) if config.proxy else {}


class State(enum.Enum):
    CONNECTING = "connecting"
    GREETING = "greeting"
    SERVING = "serving"
    ENDING = "ending"  # the keeper is gone, or the settings are others


class GuestAgent:
    """Takes messages from the broker to the part that handles them."""

    _log = Logger()

    def __init__(self, reactor: Any, config: GuestConfig, home: Path) -> None:
        self._reactor = reactor
        self._config = config
        self._home = home
        self._epoch = 0  # as the host counts them; 0 until it has told us
        self._hello: IDelayedCall | None = None
        self._hello_wait = HELLO_AGAIN
        self._leaves_keeper = False  # the next agent finds its commands running
        self.state = State.CONNECTING

    def wire(
        self,
        broker: BrokerLink,
        link: Link,
        journal: Journal,
        runner: Runner,
        copier: Copier,
        presence: Presence,
    ) -> None:
        self._broker, self._link, self._journal = broker, link, journal
        self._runner, self._copier, self._presence = runner, copier, presence
        self._handlers: dict[type[Message], Callable[[Any], None]] = {
            Run: runner.run,
            Signal: runner.signal,
            CopyIn: copier.copy_in,
            CopyOut: copier.copy_out,
            Confirm: self._confirm,
            Ping: lambda ping: link.send(Pong(ping.nonce)),
        }

    def restored(self) -> None:
        """This machine goes on from an earlier state: no connection of it leads anywhere."""
        self._broker.reconnect("this machine was restored")
        self._copier.restored()

    def host_is_there(self) -> None:
        """A pause between two attempts to connect need not be waited for."""
        self._broker.hurry()

    # -- the broker

    def broker_connected(self) -> None:
        if self.state is State.ENDING:
            return
        self.state = State.GREETING
        self._hello_wait = HELLO_AGAIN
        self._greet()

    def broker_disconnected(self, reason: str) -> None:
        if self.state is not State.ENDING:
            self.state = State.CONNECTING
        self._presence.stop()
        self._cancel_hello()

    def broker_message(self, destination: str, body: bytes) -> None:
        if self.state is State.ENDING:
            return  # not acknowledged, so the host asks again when a new agent is here
        try:
            envelope = messages.decode(body)
            if envelope.message.SENDER == "guest":
                raise ProtocolError(f"{envelope.message.NAME} does not go to guests")
        except ProtocolError as error:
            self._log.warn("refused a message: {error}", error=error)
            return
        if isinstance(envelope.message, Welcome):
            self._welcome(envelope, envelope.message)
        elif self.state is State.SERVING:
            self._link.received(envelope)
        # Else it was on its way before this connection. A guest that was restored takes it for its own session's, and
        # what it acknowledges or confirms may be of a time that is undone; what still counts comes again after WELCOME.

    def transmit(self, body: bytes) -> None:
        self._broker.send(messages.host_queue(self._config.host), body)

    def beacon(self, beacon: messages.Beacon) -> None:
        self._broker.send(messages.PRESENCE, messages.encode(Envelope(beacon, self._link.session, "")))

    # -- the handshake

    def _greet(self) -> None:
        self._hello = self._reactor.callLater(self._hello_wait, self._greet)
        self._hello_wait = min(self._hello_wait * 1.5, HELLO_MOST)
        self._link.send(
            Hello(
                guest=self._config.guest,
                boot=self._runner.boot,
                proof=messages.proof_of(self._config.secret, self._config.guest, self._link.session),
                agent_version=VERSION,
                epoch=self._epoch,
                system=f"{platform.system()} {platform.release()} {platform.machine()}",
                home=str(self._home),
                commands={**self._copier.held(), **self._runner.held()},
            )
        )

    def _cancel_hello(self) -> None:
        if self._hello is not None and self._hello.active():
            self._hello.cancel()
        self._hello = None

    def _welcome(self, envelope: Envelope, welcome: Welcome) -> None:
        if envelope.receiver not in ("", self._link.session) or welcome.host != self._config.host:
            return
        if not welcome.opened:
            if welcome.epoch != self._epoch or envelope.sender != self._link.peer:
                self._greet_anew(welcome.epoch)
            return
        if welcome.epoch != self._epoch or self.state is State.CONNECTING:
            return  # an echo of a time that is over
        self._cancel_hello()
        if self.state is not State.SERVING:
            self._log.info("the host {host} answers, epoch {epoch}", host=welcome.host, epoch=self._epoch)
        self.state = State.SERVING
        if self._link.open(envelope.sender):
            self._runner.new_session()
        self._presence.every(welcome.beacon_s)

    def _greet_anew(self, epoch: int) -> None:
        """The host counts another epoch (we have booted, or were restored without noticing) or has started anew."""
        if self.state is State.CONNECTING:
            return
        if self._epoch not in (0, epoch):
            self._log.info("this guest was restored: epoch {epoch}", epoch=epoch)
            self._link.renew(new_session())
        self._epoch = epoch
        self._presence.stop()
        self._cancel_hello()
        self.state = State.GREETING
        self._hello_wait = HELLO_AGAIN
        self._greet()

    # -- messages

    def deliver(self, message: Message) -> None:
        self._handlers[type(message)](message)

    def _confirm(self, message: Confirm) -> None:
        self._copier.confirm(message.commands)
        self._runner.confirm(message.commands)

    def keeper_lost(self) -> None:
        """Without its keeper this agent is of no use: end, and let whoever supervises it start both anew."""
        self._log.error("the keeper has ended; this agent ends too, to be started again")
        self.state = State.ENDING
        self._reactor.callLater(KEEPER_FAREWELL, self._reactor.stop)

    def settings_changed(self) -> None:
        """This machine was restored elsewhere: end, and let whoever supervises this agent start one with the new."""
        self._log.info("the settings have changed; this agent ends, to be started again with the new ones")
        self.state = State.ENDING
        self._leaves_keeper = True
        self._reactor.stop()

    def stop(self) -> Deferred[None]:
        """Say goodbye, end every command, disconnect."""
        self._cancel_hello()
        self._presence.stop()
        if self._leaves_keeper:
            self._link.close()
            self._journal.close()
            return self._broker.stop()
        self._link.send(messages.Bye(self._config.guest, "the agent was told to end"))
        self._link.close()
        self._runner.stop()
        self._journal.close()
        return self._broker.stop()
