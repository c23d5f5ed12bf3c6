"""The journal: which commands this guest was given, on disk before they have any effect.

One JSON object a line, appended and flushed to the disk: {"id": …, "is": "accepted"}, then {"id": …, "is": "ended",
"result": {…}}, then {"id": …, "is": "forgotten"}. A repeat of a known command is answered from here.
A line that a power cut left half written is the last one and is ignored.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

COMPACT_AFTER = 2000  # lines of forgotten commands


class Journal:
    """The commands of one guest, by id: None while accepted, a result's fields once ended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.commands: dict[str, dict[str, Any] | None] = {}
        self._lines = 0
        self._load()
        self._file = path.open("ab", buffering=0)

    def _load(self) -> None:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        lines = data.split(b"\n")
        for line in lines[:-1]:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry["is"] == "accepted":
                self.commands[entry["id"]] = None
            elif entry["is"] == "ended":
                self.commands[entry["id"]] = entry["result"]
            else:
                self.commands.pop(entry["id"], None)
        if lines[-1]:
            # A line without its end: cut it off, or the next line would be glued to it.
            os.truncate(self._path, len(data) - len(lines[-1]))
        self._lines = len(lines)

    def accepted(self, command: str) -> None:
        """Note a command, before it has any effect."""
        self.commands[command] = None
        self._append({"id": command, "is": "accepted"})

    def ended(self, command: str, result: dict[str, Any]) -> None:
        """Note how it ended, before the host is told."""
        self.commands[command] = result
        self._append({"id": command, "is": "ended", "result": result})

    def forgotten(self, command: str) -> None:
        """The host has the result. Not flushed: to forget twice does no harm."""
        if self.commands.pop(command, None) is not None:
            self._append({"id": command, "is": "forgotten"}, flush=False)
        if self._lines > COMPACT_AFTER + 2 * len(self.commands):
            self._compact()

    def _append(self, entry: dict[str, Any], *, flush: bool = True) -> None:
        self._file.write(json.dumps(entry, separators=(",", ":")).encode("ascii") + b"\n")
        self._lines += 1
        if flush:
            os.fdatasync(self._file.fileno())

    def _compact(self) -> None:
        fresh = self._path.with_suffix(".new")
        with fresh.open("wb") as file:
            for command, result in self.commands.items():
                entries: list[dict[str, Any]] = [{"id": command, "is": "accepted"}]
                if result is not None:
                    entries.append({"id": command, "is": "ended", "result": result})
                for entry in entries:
                    file.write(json.dumps(entry, separators=(",", ":")).encode("ascii") + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._file.close()
        fresh.replace(self._path)
        self._file = self._path.open("ab", buffering=0)
        self._lines = 2 * len(self.commands)

    def close(self) -> None:
        self._file.close()
