"""Where VirtualBox's interface differs between 6.1 and 7.2: every difference that this driver meets, in one table.

Each is probed on the objects of the running version: no version number is compared. `versions` says what was found
where: 6.1 and 7.0/7.1 as their interface descriptions have them, 7.2 as it was run. Enum values differ as well
(Running is 5 in 6.1 and 6 since 7.0): `pyvbox.py` reads them from the running version.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import attrs


@attrs.frozen
class Difference:
    """`probe` looks at a raw object or method; `ways` maps what it finds to how the thing is done there."""

    what: str
    versions: str
    probe: Callable[[Any], Any]
    ways: dict[Any, Callable[..., Any]]

    def __call__(self, subject: Any, *arguments: Any) -> Any:
        """Do it the running version's way."""
        found = self.probe(subject)
        way = self.ways.get(found)
        if way is None:
            raise NotImplementedError(f"this VirtualBox has another way to {self.what} ({found!r}) than any known one")
        return way(subject, *arguments)


def _parameters(method: Any) -> int:
    return len(inspect.signature(method).parameters)


def _has(name: str) -> Callable[[Any], bool]:
    return lambda subject: getattr(subject, name, None) is not None


def _array(subject: Any, name: str) -> Any:
    """An array attribute: XPCOM has a method for it, COM has the attribute."""
    method = getattr(subject, "get" + name[0].upper() + name[1:], None)
    return method() if callable(method) else getattr(subject, name)


def _set(subject: Any, name: str, value: Any) -> None:
    setattr(subject, name, value)


create_machine = Difference(
    "create a machine",
    "6.1: file, name, groups, system, flags. 7.0: also cipher, password id, password. 7.1: platform after the name",
    probe=lambda vbox: _parameters(vbox.createMachine),
    ways={
        5: lambda vbox, x86, file, name, groups, system, flags: vbox.createMachine(file, name, groups, system, flags),
        8: lambda vbox, x86, file, name, groups, system, flags: vbox.createMachine(
            file, name, groups, system, flags, "", "", ""
        ),
        9: lambda vbox, x86, file, name, groups, system, flags: vbox.createMachine(
            file, name, x86, groups, system, flags, "", "", ""
        ),
    },
)

set_io_apic = Difference(
    "switch on the I/O APIC, which more than one processor needs",
    "until 7.0: BIOSSettings; since 7.1: firmwareSettings",
    probe=_has("firmwareSettings"),
    ways={
        True: lambda machine: _set(machine.firmwareSettings, "IOAPICEnabled", True),
        False: lambda machine: _set(machine.BIOSSettings, "IOAPICEnabled", True),
    },
)

switch_off_audio = Difference(
    "switch off the sound card",
    "6.1: audioAdapter; since 7.0: audioSettings.adapter",
    probe=_has("audioSettings"),
    ways={
        True: lambda machine: _set(machine.audioSettings.adapter, "enabled", False),
        False: lambda machine: _set(machine.audioAdapter, "enabled", False),
    },
)

clock_in_utc = Difference(
    "keep the hardware clock in UTC",
    "until 7.0: RTCUseUTC of the machine; since 7.1: of its platform",
    probe=_has("platform"),
    ways={
        True: lambda machine: _set(machine.platform, "RTCUseUTC", True),
        False: lambda machine: _set(machine, "RTCUseUTC", True),
    },
)

reach_loopback = Difference(
    "let NAT reach the host's loopback interface at the gateway",
    "6.1: always reachable; since 7.0: localhostReachable, off unless set",
    probe=_has("localhostReachable"),
    ways={
        True: lambda engine: _set(engine, "localhostReachable", True),
        False: lambda engine: None,
    },
)
