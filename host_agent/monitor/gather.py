"""Filling a model from host agents without a reactor: for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from host_agent.control_client import ControlClient, ControlError, Endpoint

from .model import Model

SECONDS = 10.0  # for one answer


@attrs.define
class _Host:
    client: ControlClient
    log: str = ""
    since: int = 0


class Gatherer:
    """`look` blocks, so it is called in a thread; the model is its alone meanwhile."""

    def __init__(self, model: Model, find: Callable[[], list[Endpoint]]) -> None:
        self._model = model
        self._find = find
        self._hosts: dict[str, _Host] = {}

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
        for host in self._hosts.values():
            host.client.close()
