"""Filling a model from host agents and brokers without a reactor: for the terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from host_agent.broker.report import BrokerReport
from host_agent.broker.watch import WatchSettings, ask, pause_of
from host_agent.control_client import ControlClient, ControlError, Endpoint

from .listener import Listener
from .model import BROKER, Model
from .presence import Presence

SECONDS = 10.0  # for one answer


@attrs.define
class _Host:
    client: ControlClient
    log: str = ""
    since: int = 0


class _Report:
    """What a broker says of itself, asked in a thread: it may take longer than the pause between two looks."""

    def __init__(self, settings: WatchSettings) -> None:
        self._settings = settings
        self._told: list[BrokerReport] = []
        self._next = 0.0
        self._thread: threading.Thread | None = None

    def newest(self) -> BrokerReport | None:
        """What was answered since the last call; asks anew when it is time."""
        if (self._thread is None or not self._thread.is_alive()) and time.monotonic() >= self._next:
            self._next = time.monotonic() + pause_of(self._settings)
            self._thread = threading.Thread(target=self._ask, daemon=True)
            self._thread.start()
        return self._told.pop() if self._told else None

    def _ask(self) -> None:
        self._told[:] = [ask(self._settings)]


class Gatherer:
    """`look` blocks, so it is called in a thread; the model is its alone meanwhile."""

    def __init__(self, model: Model, find: Callable[[], list[Endpoint]], brokers: Sequence[WatchSettings] = ()) -> None:
        self._model = model
        self._find = find
        self._hosts: dict[str, _Host] = {}
        self._presence = Presence(model, here=lambda: self._hosts)
        self._listeners = [Listener(settings) for settings in brokers]
        self._reports = [_Report(settings) for settings in brokers]
        for listener in self._listeners:
            listener.start()

    def look(self) -> None:
        """Ask every host agent once."""
        found = {endpoint.agent: endpoint for endpoint in self._find()}
        for name in [name for name in self._hosts if name not in found]:
            self._hosts.pop(name).client.close()
            self._model.host_gone(name)
        for name, endpoint in found.items():
            try:
                if name not in self._hosts:
                    self._hosts[name] = _Host(ControlClient.connect(endpoint))
                self._ask(name, self._hosts[name])
            except ControlError as error:
                host = self._hosts.pop(name, None)
                if host is not None:
                    host.client.close()
                self._model.host_lost(name, str(error))
        for listener in self._listeners:
            self._presence.heard(listener.name, listener.settings.kind, listener.take())
        for report in self._reports:
            if (told := report.newest()) is not None:
                self._model.broker(BROKER, told.to_json())
        self._presence.look()
        self._model.look()
        self._model.changes()  # nobody else wants them

    def _ask(self, name: str, host: _Host) -> None:
        def call(what: str, **args: Any) -> dict[str, Any]:
            return host.client.call(what, args, deadline_s=SECONDS)

        self._model.host(name, call("host"))
        self._model.vms(name, call("vms")["vms"])
        batch = call("events", log=host.log, since=host.since, wait_s=0)
        host.log, host.since = batch["log"], batch["last"]
        for event in batch["events"]:
            self._model.event(name, event)
        self._model.commands_of(name, call("commands")["commands"])
        self._model.copies_of(name, call("copies")["copies"])
        self._model.broker(name, call("broker"))

    def close(self) -> None:
        for listener in self._listeners:
            listener.stop()
        for host in self._hosts.values():
            host.client.close()
