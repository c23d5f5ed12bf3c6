"""What a person may set for VMs of VirtualBox, in the environment of the host agent (`docs/virtualbox.md`)."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from common.errors import ConfigError

NETWORK = "VMWRAPPER_VIRTUALBOX_NETWORK"
CPU_CAP = "VMWRAPPER_VIRTUALBOX_CPU_CAP"


@attrs.frozen
class Settings:
    """`network`: "nat" or "hostonly:NAME". `cpu_cap`: percent of a core that each virtual processor may use."""

    network: str = "nat"
    cpu_cap: int = 100

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        network = environment.get(NETWORK, "nat")
        kind, _, name = network.partition(":")
        if not (network == "nat" or (kind == "hostonly" and name)):
            raise ConfigError(f"{NETWORK} is {network!r}", "set it to nat, or to hostonly:NAME as in hostonly:vboxnet0")
        text = environment.get(CPU_CAP, "100")
        if not text.isdecimal() or not 1 <= int(text) <= 100:
            raise ConfigError(f"{CPU_CAP} is {text!r}", "set it to a number of percent from 1 to 100")
        return cls(network, int(text))
