"""Rows by key that remember what has changed since somebody last asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Row = dict[str, Any]


class Table:
    """Rows are values: set a new one rather than change one."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._rows: dict[str, Row] = {}
        self._of_host: dict[str, set[str]] = {}
        self._changed: dict[str, Row | None] = {}
        self.left_out = 0  # rows for which there is no room

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        return iter(list(self._rows.items()))

    def get(self, key: str) -> Row | None:
        return self._rows.get(key)

    @property
    def rows(self) -> Mapping[str, Row]:
        return self._rows

    def set(self, key: str, row: Row) -> None:
        before = self._rows.get(key)
        if before == row:
            return
        if before is None and len(self._rows) >= self._most:
            self.left_out += 1
            return
        self._rows[key] = row
        if before is None:
            self._of_host.setdefault(row["host"], set()).add(key)
        self._changed[key] = row

    def patch(self, key: str, **values: Any) -> None:
        """Change a row that is there."""
        row = self._rows.get(key)
        if row is not None:
            self.set(key, {**row, **values})

    def drop(self, key: str) -> None:
        row = self._rows.pop(key, None)
        if row is not None:
            self._of_host[row["host"]].discard(key)
            if not self._of_host[row["host"]]:
                del self._of_host[row["host"]]
            self._changed[key] = None

    def of_host(self, host: str) -> list[str]:
        """The keys of its rows."""
        return list(self._of_host.get(host, ()))

    def keep_only(self, host: str, keys: Iterable[str]) -> list[str]:
        """Of this host, no other rows than these are left; returns the keys of those that went."""
        kept = set(keys)
        gone = [key for key in self.of_host(host) if key not in kept]
        for key in gone:
            self.drop(key)
        return gone

    def changes(self) -> dict[str, Row | None]:
        """What has changed since the last call; None: the row is gone."""
        changed, self._changed = self._changed, {}
        return changed
