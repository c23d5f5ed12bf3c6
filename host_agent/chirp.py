"""Copies by Chirp: cctools' `chirp_put` and `chirp_get`, for guests that run a `chirp_server`.

The first VM controller copied in this way. HTTP (`copies.py`) is the default: it needs nothing in the guest but our
agent and no way into it, goes on after a break, and survives this process. A copy by Chirp does neither; when it
breaks, ask again. Chirp's own login applies, which is the guest's affair (its server's --auth and ACL).
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessDone
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure

from common.errors import ConfigError, TransferError

PATIENCE = 30  # seconds in which a tool tries to reach the server again
STEP_DEADLINE = 60.0  # seconds for a step that moves no file
COPY_DEADLINE = 86_400.0
MOST_OUTPUT = 64 * 1024  # bytes of a tool's words
BLOCK = 1024 * 1024


@attrs.frozen
class Chirp:
    """The tools, in a directory or on PATH."""

    reactor: Any
    tools: Path | None = None

    async def put(self, server: str, source: Path, destination: str) -> dict[str, Any]:
        """A file or directory of this host to HOST:PORT. A file has its final name only when it is whole."""
        place = _relative(destination)
        if not source.exists():
            raise TransferError(f"there is no {source}")
        if str(place.parent) != ".":
            await self._run("chirp", server, "mkdir", "-p", str(place.parent))
        if source.is_dir():
            await self._run("chirp_put", str(source), server, str(place), deadline=COPY_DEADLINE)
        else:
            new = place.with_name(f".{place.name}.{secrets.token_hex(4)}.new")
            await self._run("chirp_put", str(source), server, str(new), deadline=COPY_DEADLINE)
            ours = await deferToThread(_md5, source)
            theirs = await self._run("chirp", server, "md5", str(new), deadline=COPY_DEADLINE)
            if ours not in theirs.lower():
                raise TransferError(f"{source} changed on its way: MD5 {ours} here, {theirs.strip()!r} there")
            await self._run("chirp", server, "mv", str(new), str(place))
        return await deferToThread(_describe, source)

    async def get(self, server: str, source: str, destination: Path) -> dict[str, Any]:
        """A file or directory of HOST:PORT to this host; it has its final name only when it is whole."""
        place = _relative(source)
        new = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.new")
        try:
            new.parent.mkdir(parents=True, exist_ok=True)
            await self._run("chirp_get", server, str(place), str(new), deadline=COPY_DEADLINE)
            if new.is_file():
                ours = await deferToThread(_md5, new)
                theirs = await self._run("chirp", server, "md5", str(place), deadline=COPY_DEADLINE)
                if ours not in theirs.lower():
                    raise TransferError(f"{place} changed on its way: MD5 {ours} here, {theirs.strip()!r} there")
            done = await deferToThread(_describe, new)
            new.replace(destination)
        except OSError as error:
            raise TransferError(f"{destination} cannot be written: {error.strerror}") from None
        finally:
            _remove(new)
        return done

    def _run(self, tool: str, *words: str, deadline: float = STEP_DEADLINE) -> Deferred[str]:
        """Run a tool; fires with what it printed, or fails with its words."""
        program = self._program(tool)
        argv = [program, "-t", str(PATIENCE), *words]
        run = _Run(tool)
        process = self.reactor.spawnProcess(run, program, argv, env=None)

        def too_late(result: object, seconds: float) -> str:
            raise TransferError(f"{tool} did not end within {seconds:.0f} s")

        def ended(result: Any) -> Any:
            if run.running:
                process.signalProcess("KILL")
            return result

        run.done.addTimeout(deadline, self.reactor, too_late)
        return run.done.addBoth(ended)

    def _program(self, tool: str) -> str:
        found = shutil.which(str(self.tools / tool) if self.tools is not None else tool)
        if found is None:
            where = f"in {self.tools}" if self.tools is not None else "on PATH"
            raise ConfigError(f"there is no {tool} {where}", "apt-get install coop-computing-tools")
        return found


class _Run(ProcessProtocol):
    """One run of a tool, whose words have a bound."""

    def __init__(self, tool: str) -> None:
        self.done: Deferred[str] = Deferred(lambda _: None)
        self.running = True
        self._tool = tool
        self._said = bytearray()

    def outReceived(self, data: bytes) -> None:
        self._said += data[: max(0, MOST_OUTPUT - len(self._said))]

    errReceived = outReceived

    def processEnded(self, reason: Failure) -> None:
        self.running = False
        text = self._said.decode("utf-8", "replace")
        if reason.check(ProcessDone):
            self.done.callback(text)
        else:
            words = " ".join(text.split())[-500:] or str(reason.value)
            self.done.errback(TransferError(f"{self._tool} says: {words}"))


def _relative(path: str) -> PurePosixPath:
    """A path below the server's root."""
    place = PurePosixPath(path)
    if not path or place.is_absolute() or ".." in place.parts or place == PurePosixPath("."):
        raise ConfigError(f"{path!r} must be a relative path without '..'")
    return place


def _md5(path: Path) -> str:
    """As Chirp's servers compute it: against damage, not against an enemy."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _describe(path: Path) -> dict[str, Any]:
    files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    return {"files": len(files), "bytes": sum(each.stat().st_size for each in files), "sha256": ""}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
