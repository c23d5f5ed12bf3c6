"""Who a client is, and which destinations it may use."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import attrs


@attrs.frozen
class Principal:
    """A client that has logged in; the two rules are asked with a whole destination, `/queue/NAME`."""

    name: str
    may_send: Callable[[str], bool]
    may_subscribe: Callable[[str], bool]

    @classmethod
    def with_rules(cls, name: str, *, send: Iterable[str] = (), subscribe: Iterable[str] = ()) -> Principal:
        """Allowed are exact destinations, and with a `*` at the end all that begin so."""
        return cls(name, destination_rule(send), destination_rule(subscribe))


def destination_rule(patterns: Iterable[str]) -> Callable[[str], bool]:
    """A test for destinations: exact names, or prefixes written with a `*` at the end."""
    listed = tuple(patterns)
    exact = frozenset(pattern for pattern in listed if not pattern.endswith("*"))
    prefixes = tuple(pattern[:-1] for pattern in listed if pattern.endswith("*"))

    def allowed(destination: str) -> bool:
        return destination in exact or destination.startswith(prefixes)

    return allowed


def allow_all(name: str = "anyone") -> Principal:
    """A principal that may use every destination: for tests, and for a broker with one owner."""
    return Principal.with_rules(name, send=["*"], subscribe=["*"])
