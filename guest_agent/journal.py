"""The journal: which commands this guest was given, on disk before they have any effect.

One JSON object a line: {"id": …, "is": "accepted", "keeper": …}, then {"id": …, "is": "ended", "result": {…}}, then
{"id": …, "is": "forgotten"}. A repeat of a known command is answered from here. For copies, which may be done twice
without harm, only the end is noted ("copied").
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.line_log import LineLog

COMPACT_AFTER = 2000  # lines of forgotten commands


class Journal:
    """`commands` of one guest, by id: None while accepted, a result's fields once ended. `copies`: those that ended.

    What is noted survives the agent. Where `lasting` it survives a power cut after a `flush`, too; a machine whose disk
    ends with its memory has nothing to survive.
    """

    lasting = True

    def __init__(self, path: Path) -> None:
        self._log = LineLog(path)
        self.commands: dict[str, dict[str, Any] | None] = {}
        self.copies: dict[str, dict[str, Any]] = {}
        self._keepers: dict[str, str] = {}
        for entry in self._log.entries:
            self._take(entry)
        self._log.entries.clear()

    def _take(self, entry: dict[str, Any]) -> None:
        command, what, result = entry.get("id"), entry.get("is"), entry.get("result")
        if not isinstance(command, str):
            return
        if what == "accepted":
            self.commands[command] = None
            self._keepers[command] = str(entry.get("keeper", ""))
        elif what == "ended" and isinstance(result, dict):
            self.commands[command] = result
        elif what == "copied" and isinstance(result, dict):
            self.copies[command] = result
        elif what == "forgotten":
            self.commands.pop(command, None)
            self.copies.pop(command, None)
            self._keepers.pop(command, None)

    def accepted(self, command: str, keeper: str) -> None:
        """Note a command, and the keeper that is going to run it. It may have an effect after the next `flush`.

        OSError: it is not noted, and must not run.
        """
        self._log.append({"id": command, "is": "accepted", "keeper": keeper}, flush=False)
        self.commands[command] = None
        self._keepers[command] = keeper

    def flush(self) -> None:
        """All that was noted survives a power cut. OSError: it may not."""
        if self.lasting:
            self._log.flush()

    def keeper_of(self, command: str) -> str:
        """Which keeper was going to run it."""
        return self._keepers.get(command, "")

    def ended(self, command: str, result: dict[str, Any]) -> None:
        """Note how it ended. OSError: a restart of agent and keeper would report it lost.

        Not flushed: after a power cut of the guest in this moment it is reported lost.
        """
        self.commands[command] = result
        self._log.append({"id": command, "is": "ended", "result": result}, flush=False)

    def copied(self, copy: str, result: dict[str, Any]) -> None:
        """Note how a copy ended. Not flushed: after a power cut the host asks for it again."""
        self.copies[copy] = result
        self._log.append({"id": copy, "is": "copied", "result": result}, flush=False)

    def forgotten(self, command: str) -> None:
        """The host has the result. Not flushed: to forget twice does no harm."""
        self._keepers.pop(command, None)
        known = self.commands.pop(command, self) is not self
        known = self.copies.pop(command, None) is not None or known
        if known:
            self._log.append({"id": command, "is": "forgotten"}, flush=False)
        held = len(self.commands) + len(self.copies)
        if self._log.lines > COMPACT_AFTER + 2 * held:
            self._log.rewrite(self._present())

    def _present(self) -> Iterator[dict[str, Any]]:
        for command, result in self.commands.items():
            yield {"id": command, "is": "accepted", "keeper": self.keeper_of(command)}
            if result is not None:
                yield {"id": command, "is": "ended", "result": result}
        for copy, result in self.copies.items():
            yield {"id": copy, "is": "copied", "result": result}

    def close(self) -> None:
        self._log.close()
