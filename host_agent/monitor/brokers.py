"""External brokers: asked how they do now and then, in a thread, and listened to all the time, in another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.internet.threads import deferToThread
from twisted.logger import Logger

from host_agent.broker.report import BrokerReport
from host_agent.broker.watch import WatchSettings, ask, pause_of
from host_agent.metrics import Metrics

from .listener import Listener
from .model import BROKER, Model
from .presence import Presence

TAKE_EVERY = 0.1  # seconds between two looks at what has come
LOOK_EVERY = 2.0  # seconds between two looks for silence


class BrokerWatch:
    """Asks one broker, and once more only when it has answered."""

    _log = Logger()

    def __init__(self, reactor: Any, settings: WatchSettings, model: Model, metrics: Metrics) -> None:
        self._settings = settings
        self._model = model
        self._metrics = metrics
        self._asking = LoopingCall(self._ask)
        self._asking.clock = reactor

    def start(self) -> None:
        self._asking.start(pause_of(self._settings)).addErrback(
            lambda failure: self._log.failure("{broker} is watched no more", failure, broker=self._settings.broker)
        )

    def _ask(self) -> Deferred[None]:
        def told(report: BrokerReport) -> None:
            if self._asking.running:
                self._model.broker(BROKER, report.to_json())
                self._metrics.broker(report.name, report.to_json())

        return deferToThread(ask, self._settings).addCallback(told)

    def stop(self) -> None:
        if self._asking.running:
            self._asking.stop()


class Listening:
    """Takes what is heard through brokers to the model."""

    _log = Logger()

    def __init__(self, reactor: Any, brokers: Sequence[WatchSettings], presence: Presence) -> None:
        self._listeners = [Listener(settings) for settings in brokers]
        self._presence = presence
        self._taking = LoopingCall(self._take)
        self._taking.clock = reactor
        self._looking = LoopingCall(presence.look)
        self._looking.clock = reactor

    def start(self) -> None:
        if not self._listeners:
            return
        for listener in self._listeners:
            listener.start()
        for call, seconds in ((self._taking, TAKE_EVERY), (self._looking, LOOK_EVERY)):
            call.start(seconds).addErrback(lambda failure: self._log.failure("brokers are heard no more", failure))

    def _take(self) -> None:
        for listener in self._listeners:
            self._presence.heard(listener.name, listener.settings.kind, listener.take())

    def stop(self) -> None:
        for call in (self._taking, self._looking):
            if call.running:
                call.stop()
        for listener in self._listeners:
            listener.stop()
