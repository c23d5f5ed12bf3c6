"""What the chaos run asks for: commands with an effect that cannot be idempotent, and copies, each with its check."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import attrs


@attrs.define
class Work:
    """One thing that has to happen; asked for again under a new id when the answer is that it was lost."""

    number: int
    vm: str
    attempt: int = 1
    asked_at: float = 0.0

    @property
    def id(self) -> str:
        return f"{type(self).__name__.lower()}-{self.number}-{self.attempt}"


@attrs.define
class Command(Work):
    """Adds its id to `effects` once for each time that it is run, prints lines, and ends with its own exit code."""

    lines: int = 0
    pause: float = 0.0
    exit_code: int = 0

    def request(self, folder: Path) -> dict[str, Any]:
        lines = f"seq {self.lines}; sleep {self.pause:.3f}; seq {self.lines} >&2"
        script = f'echo {self.id} >> "$1"; {lines}; exit {self.exit_code}'
        return {
            "vm": self.vm,
            "command": self.id,
            "argv": ["sh", "-c", script, "sh", str(folder / "effects")],
            "stdout": str(folder / f"{self.id}.out"),
            "stderr": str(folder / f"{self.id}.err"),
        }

    def wrong(self, folder: Path, result: dict[str, Any]) -> str:
        """What is not as it has to be in a command that was run; the effects are counted at the end."""
        if result["exit_code"] != self.exit_code:
            return f"{self.id}: exit code {result['exit_code']}, not {self.exit_code}"
        expected = b"".join(b"%d\n" % number for number in range(1, self.lines + 1))
        for stream in ("out", "err"):
            file = folder / f"{self.id}.{stream}"
            found = file.read_bytes() if file.exists() else b""
            if found != expected:
                return f"{self.id}: std{stream} has {len(found)} bytes, not the {len(expected)} that were printed"
            file.unlink(missing_ok=True)
        return ""


@attrs.define
class Copy(Work):
    """A file into the guest, or out of it."""

    inwards: bool = True
    size: int = 0

    def content(self) -> bytes:
        return random.Random(self.number).randbytes(self.size)

    def prepare(self, folder: Path, home: Path) -> None:
        """Put the source where it has to be; anew when the guest lost its disk."""
        self.source(folder, home).write_bytes(self.content())

    def source(self, folder: Path, home: Path) -> Path:
        return folder / f"from-{self.number}" if self.inwards else home / f"from-{self.number}"

    def destination(self, folder: Path, home: Path) -> Path:
        return home / f"to-{self.number}" if self.inwards else folder / f"to-{self.number}"

    def request(self, folder: Path) -> dict[str, Any]:
        names = {"source": f"from-{self.number}", "destination": f"to-{self.number}"}
        ours = "source" if self.inwards else "destination"
        return {"vm": self.vm, "copy": self.id, **names, ours: str(folder / names[ours])}

    def wrong(self, folder: Path, home: Path) -> str:
        """What is not as it has to be in a copy that was said to be done."""
        file = self.destination(folder, home)
        found = file.read_bytes() if file.exists() else b"nothing"
        if found != self.content():
            digest = hashlib.sha256(found).hexdigest()[:8]
            return f"{self.id}: the file is corrupt ({len(found)} bytes of {self.size}, {digest})"
        file.unlink()
        self.source(folder, home).unlink(missing_ok=True)
        return ""
