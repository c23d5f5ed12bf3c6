"""Finding the host agents of this user, and the one that has a certain VM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from common.errors import ConfigError
from host_agent.control_client import ControlClient, ControlError, endpoints


@attrs.frozen
class Found:
    """A VM and the connection to its host agent."""

    client: ControlClient
    agent: str
    vm: dict[str, Any]


def every_vm() -> Iterator[Found]:
    """All VMs of all host agents. An agent that does not answer is passed over with its reason."""
    for endpoint in endpoints():
        try:
            client = ControlClient.connect(endpoint)
            vms = client.call("vms")["vms"]
        except ControlError:
            continue
        for vm in vms:
            yield Found(client, endpoint.agent, vm)


def find_vm(name: str) -> Found:
    """The one VM of this name."""
    found = list(every_vm())
    matches = [each for each in found if each.vm["vm"] == name or each.vm["instance"] == name]
    if not matches:
        known = ", ".join(sorted(each.vm["vm"] for each in found)) or "none"
        raise ConfigError(f"no VM is named {name} (there: {known})", "start one with: vmctl start NAME")
    if len(matches) > 1:
        ids = ", ".join(each.vm["instance"] for each in matches)
        raise ConfigError(f"{len(matches)} VMs are named {name}", f"say which, by its instance: {ids}")
    return matches[0]
