"""Finds the host agents of this user and follows each: its events as they come, its lists every two seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil
from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger

from host_agent.control_client import ControlError, Endpoint
from host_agent.metrics import Metrics

from .control import ControlConnection, connect
from .model import Model

LOOK_EVERY = 2.0  # seconds between two looks at a host agent's lists
FIND_EVERY = 2.0  # seconds between two looks for host agents
EVENTS_PAUSE = 0.1  # seconds between two questions for events: so many travel together
EVENTS_WAIT = 20.0  # seconds that a host agent lets us wait for events
AGAIN = 3.0  # seconds before a host agent that was lost is called again


class HostFeed:
    """One host agent, for as long as its endpoint file is there."""

    _log = Logger()

    def __init__(self, reactor: Any, endpoint: Endpoint, model: Model, metrics: Metrics) -> None:
        self.endpoint = endpoint
        self.host = endpoint.agent
        self._reactor = reactor
        self._model = model
        self._metrics = metrics
        self._stopped = False
        self._log_id = ""
        self._since = 0
        self.connection: ControlConnection | None = None
        self.done = Deferred.fromCoroutine(self._run())

    async def _run(self) -> None:
        while not self._stopped:
            try:
                self.connection = await connect(self._reactor, self.endpoint)
                events = Deferred.fromCoroutine(self._follow_events(self.connection))
                try:
                    await self._follow_lists(self.connection)
                finally:
                    self.connection.close()
                    await events
            except ControlError as error:
                self._lost(str(error))
            except Exception as error:
                self._log.failure("{host} cannot be followed", host=self.host)
                self._lost(f"it says what we do not understand ({error!r:.100})")
            self.connection = None
            if not self._stopped:
                await deferLater(self._reactor, AGAIN)

    def _lost(self, why: str) -> None:
        if not self._stopped and psutil.pid_exists(self.endpoint.pid):
            self._model.host_lost(self.host, why)
            self._metrics.host_up(self.host, False)

    async def _follow_lists(self, connection: ControlConnection) -> None:
        while not self._stopped:
            self._model.host(self.host, await connection.call("host"))
            vms = (await connection.call("vms"))["vms"]
            self._model.vms(self.host, vms)
            self._model.commands_of(self.host, (await connection.call("commands"))["commands"])
            self._model.copies_of(self.host, (await connection.call("copies"))["copies"])
            report = await connection.call("broker")
            self._model.broker(self.host, report)
            self._metrics.host_up(self.host, True)
            self._metrics.vms(self.host, vms)
            self._metrics.broker(self.host, report)
            await deferLater(self._reactor, LOOK_EVERY)

    async def _follow_events(self, connection: ControlConnection) -> None:
        try:
            while not self._stopped:
                asked = {"log": self._log_id, "since": self._since, "wait_s": EVENTS_WAIT}
                batch = await connection.call("events", asked, EVENTS_WAIT + 10)
                self._log_id, self._since = batch["log"], batch["last"]
                for event in batch["events"]:
                    self._model.event(self.host, event)
                    self._metrics.event(self.host, event)
                await deferLater(self._reactor, EVENTS_PAUSE)
        except ControlError:
            connection.close()  # the lists then end, too

    def stop(self) -> Deferred[None]:
        """Follow it no more."""
        self._stopped = True
        if self.connection is not None:
            self.connection.close()
        self._model.host_gone(self.host)
        self._metrics.host_gone(self.host)
        return self.done


class HostFeeds:
    """A feed for each host agent that `find` finds."""

    _log = Logger()

    def __init__(self, reactor: Any, model: Model, metrics: Metrics, find: Callable[[], list[Endpoint]]) -> None:
        self._reactor = reactor
        self._model = model
        self._metrics = metrics
        self._find = find
        self.feeds: dict[str, HostFeed] = {}
        self._finding = LoopingCall(self._look)
        self._finding.clock = reactor

    def start(self) -> None:
        self._finding.start(FIND_EVERY)

    def _look(self) -> None:
        found = {endpoint.agent: endpoint for endpoint in self._find()}
        for host in [host for host, feed in self.feeds.items() if found.get(host) != feed.endpoint]:
            self.feeds.pop(host).stop().addErrback(lambda failure: self._log.failure("a feed failed", failure))
        for host, endpoint in found.items():
            if host not in self.feeds:
                self.feeds[host] = HostFeed(self._reactor, endpoint, self._model, self._metrics)

    def connection(self, host: str) -> ControlConnection:
        """To a host agent that is there; ControlError."""
        feed = self.feeds.get(host)
        if feed is None or feed.connection is None or feed.connection.closed:
            raise ControlError(
                "no_agent",
                f"There is no connection to the host agent {host[:64]} now.",
                "one that is heard through a broker is asked on its own machine, by vmctl",
            )
        return feed.connection

    def stop(self) -> None:
        """Follow nobody."""
        if self._finding.running:
            self._finding.stop()
        for feed in self.feeds.values():
            feed.stop().addErrback(lambda failure: None)  # we end, and nobody looks any more
        self.feeds.clear()
