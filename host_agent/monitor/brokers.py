"""External brokers, asked now and then in a thread."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.internet.threads import deferToThread
from twisted.logger import Logger

from host_agent.broker.report import BrokerReport
from host_agent.broker.watch import WatchSettings, ask, pause_of
from host_agent.metrics import Metrics

from .model import Model

WHO = "broker"  # tells this report from a host agent's own


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
                self._model.broker(WHO, report.to_json())
                self._metrics.broker(report.name, report.to_json())

        return deferToThread(ask, self._settings).addCallback(told)

    def stop(self) -> None:
        if self._asking.running:
            self._asking.stop()
