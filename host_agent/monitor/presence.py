"""Hosts and guests that are heard through a broker: their host agents run elsewhere, and no control interface is there.

A host agent's STATUS says everything of its guests; what a guest's own BEACON says is taken besides: when it was last
heard, and, once its host agent is silent, what still runs in it. Nobody proves who sends a beacon, so it never says
more of a guest than its host agent contradicts ten seconds later.

host    HEARD ──no STATUS for SILENT_AFTER──▶ SILENT ──any──▶ HEARD ──goodbye──▶ ·      SILENT ──FORGET_AFTER──▶ ·
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container

import attrs
from twisted.logger import Logger

from common import messages
from common.errors import ProtocolError
from common.messages import Beacon, Status
from host_agent.events import Happened
from host_agent.metrics import Metrics

from . import told
from .listener import Heard
from .model import Model

SILENT_AFTER = 35.0  # seconds, as a host agent has it for its guests
FORGET_AFTER = 24 * 3600.0
MOST_HOSTS = 1000
MOST_GUESTS = 5000  # whose beacons are remembered
MOST_STRANGERS = 1000  # guests that no host agent tells of
MOST_PARTS = 64
STATUS_GRACE = 15.0  # seconds after a connection in which host agents tell which guests are theirs
SAME_CLOCK = 2.0  # seconds that a message may take
COMPLAIN_EVERY = 10.0


@attrs.define(eq=False)
class _Host:
    name: str
    agent: str
    broker: str
    heard: float
    silent: bool = False
    shift: float = 0.0  # by how much our clock is ahead of its
    log: str = ""
    seq: int = 0  # of the last event that was taken
    round: int = -1
    parts: dict[int, told.View] = attrs.field(factory=dict)


@attrs.define(eq=False)
class _Guest:
    host: str
    heard: float
    broker: str


@attrs.define
class _Broker:
    connections: int = 0
    connected_at: float | None = None
    complained: float = 0.0
    refused: int = 0


class Presence:
    """Takes what listeners have heard to the model. `here`: agents that are seen through their control interface."""

    _log = Logger()

    def __init__(
        self,
        model: Model,
        metrics: Metrics | None = None,
        here: Callable[[], Container[str]] = tuple,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._metrics = metrics
        self._here = here
        self._clock = monotonic
        self._hosts: dict[str, _Host] = {}
        self._guests: dict[str, _Guest] = {}
        self._ours: dict[str, str] = {}  # logins of agents that are seen through their control interface
        self._brokers: dict[str, _Broker] = {}

    def heard(self, name: str, kind: str, heard: Heard) -> None:
        """What a listener has, now and then; also when there is nothing."""
        broker = self._brokers.setdefault(name, _Broker())
        now = self._clock()
        if heard.connections != broker.connections:
            broker.connections, broker.connected_at = heard.connections, now
            self._not_deaf(name, now)
        if not heard.connected:
            broker.connected_at = None
        self._model.listening(name, kind, heard.connected, heard.problem)
        for topic, body in heard.messages:
            try:
                self._received(topic, body, name, broker)
            except ProtocolError as error:
                self._refused(name, broker, str(error))
        if heard.lost:
            self._refused(name, broker, f"more came than could be taken: {heard.lost} messages are lost")

    def _not_deaf(self, name: str, now: float) -> None:
        """It was we who could not hear."""
        for host in self._hosts.values():
            if host.broker == name:
                host.heard = now
        for guest in self._guests.values():
            if guest.broker == name:
                guest.heard = now

    def _refused(self, name: str, broker: _Broker, why: str) -> None:
        broker.refused += 1
        if self._metrics is not None:
            self._metrics.event(name, {"event": Happened.REFUSED})
        now = self._clock()
        if now - broker.complained >= COMPLAIN_EVERY or not broker.complained:
            broker.complained = now
            text = f"refused what came through the broker {name}: {why} ({broker.refused} so far)"
            event = {"event": Happened.REFUSED.value, "level": "warn", "text": text, "time": self._model.clock()}
            self._model.event(name, event)

    def _received(self, topic: str, body: bytes, name: str, broker: _Broker) -> None:
        """Each topic has its own writers: a guest cannot tell a status."""
        message = messages.decode(body).message
        if isinstance(message, Status) and topic == messages.STATUS:
            self._status(message, name)
        elif isinstance(message, Beacon) and topic == messages.PRESENCE:
            self._beacon(message, name, broker)
        else:
            raise ProtocolError(f"{message.NAME} does not belong on {topic}")

    # -- host agents

    def _status(self, status: Status, broker: str) -> None:
        if status.agent in self._here():
            self._ours[status.host] = status.agent
            self._forget(status.host)
            return
        self._ours.pop(status.host, None)
        now = self._clock()
        if status.gone:
            self._forget(status.host)
            return
        host = self._hosts.get(status.host)
        if host is None:
            if len(self._hosts) >= MOST_HOSTS:
                raise ProtocolError(f"there are more than {MOST_HOSTS} host agents")
            host = self._hosts[status.host] = _Host(status.host, status.agent, broker, now)
        shift = self._model.clock() - status.clock
        if abs(shift - host.shift) > SAME_CLOCK:  # less is what messages take, and would move all times each time
            host.shift = shift
        view = told.read(status.payload, host.shift)
        host.agent, host.broker, host.heard, host.silent = status.agent, broker, now, False
        if status.log != host.log:
            host.log, host.seq = status.log, 0
        if not status.parts:
            self._events(host, view)
            return
        if status.parts > MOST_PARTS or status.part >= status.parts:
            raise ProtocolError(f"part {status.part} of {status.parts} is none of a status")
        if status.round != host.round:
            host.round, host.parts = status.round, {}
        host.parts[status.part] = view
        if len(host.parts) == status.parts:
            self._take(host, told.View.together([host.parts[number] for number in sorted(host.parts)]))
            host.parts = {}

    def _take(self, host: _Host, view: told.View) -> None:
        model, name = self._model, host.name
        model.host(name, view.host or {}, via=host.broker, clock_off_s=host.shift)
        for vm in view.vms:
            guest = self._guests.get(vm["instance"])
            if guest is not None and guest.host == name and vm.get("last_seen_s") is not None:
                vm["last_seen_s"] = min(vm["last_seen_s"], self._clock() - guest.heard)
        model.vms(name, view.vms, via=host.broker)
        for checkpoint in view.checkpoints:
            model.checkpoint(name, checkpoint)
        self._events(host, view)
        model.commands_of(name, view.commands, via=host.broker)
        model.copies_of(name, view.copies, via=host.broker)
        if self._metrics is not None:
            self._metrics.host_up(name, True)
            self._metrics.vms(name, view.vms)

    def _events(self, host: _Host, view: told.View) -> None:
        for event in view.events:
            if event["seq"] > host.seq:
                host.seq = event["seq"]
                self._model.event(host.name, event, via=host.broker)
                if self._metrics is not None:
                    self._metrics.event(host.name, event)

    def _forget(self, name: str) -> None:
        if self._hosts.pop(name, None) is not None or any(guest.host == name for guest in self._guests.values()):
            self._guests = {key: guest for key, guest in self._guests.items() if guest.host != name}
            self._model.host_gone(name)
            if self._metrics is not None:
                self._metrics.host_gone(name)

    # -- guests

    def _beacon(self, beacon: Beacon, name: str, broker: _Broker) -> None:
        if beacon.host in self._ours:
            return
        now = self._clock()
        guest = self._guests.get(beacon.guest)
        host = self._hosts.get(beacon.host)
        stranger = host is None or host.silent
        if stranger and (broker.connected_at is None or now - broker.connected_at < STATUS_GRACE):
            return
        if not self._model.beacon(beacon, name, stranger=stranger, room=guest is not None or self._room()):
            return
        if guest is None:
            if len(self._guests) >= MOST_GUESTS:
                raise ProtocolError(f"there are more than {MOST_GUESTS} guests")
            self._guests[beacon.guest] = _Guest(beacon.host, now, name)
        else:
            guest.host, guest.heard, guest.broker = beacon.host, now, name

    def _room(self) -> bool:
        return sum(guest.host not in self._hosts for guest in self._guests.values()) < MOST_STRANGERS

    # -- silence

    def look(self) -> None:
        """What nobody says any more."""
        now = self._clock()
        deaf = {name for name, broker in self._brokers.items() if broker.connected_at is None}
        alive: dict[str, set[str]] = {}
        for key, guest in list(self._guests.items()):
            silence = now - guest.heard
            if silence <= SILENT_AFTER:
                alive.setdefault(guest.host, set()).add(key)
            elif guest.broker not in deaf and guest.host not in self._hosts:
                self._model.guest_silent(guest.host, key)
            if silence > FORGET_AFTER:
                del self._guests[key]
                self._model.guest_gone(guest.host, key)
        for host in list(self._hosts.values()):
            silence = now - host.heard
            if host.broker in deaf or silence <= SILENT_AFTER:
                continue
            if silence > FORGET_AFTER:
                self._forget(host.name)
                continue
            host.silent = True
            self._model.host_silent(host.name, silence, alive.get(host.name, set()))
            if self._metrics is not None:
                self._metrics.host_up(host.name, False)
