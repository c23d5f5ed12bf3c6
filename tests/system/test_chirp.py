"""Copies by Chirp, with Debian's real tools and a real chirp_server."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from common.errors import ConfigError, TransferError
from host_agent.operations import Refused

from .conftest import Laptop, ignore

DEADLINE = 60.0


@pytest_twisted.async_yield_fixture()
async def port(laptop: Laptop) -> AsyncIterator[int]:
    """The guest runs a chirp_server for its home, which lets this host in by its address."""
    acl = laptop.home / ".acl-for-all"
    acl.write_text("address:127.0.0.1 rwlda\n")
    found = laptop.home / "chirp-port"
    words = ["chirp_server", "-r", str(laptop.home), "-Z", str(found), "-I", "127.0.0.1", "-u", "-"]
    words += ["-a", "address", "-A", str(acl)]
    if os.getuid() == 0:  # which it refuses to serve as
        words += ["-i", "nobody"]
        shutil.chown(laptop.home, "nobody")
        for parent in laptop.home.parents:
            if parent.stat().st_uid == 0 and parent.is_relative_to("/tmp") and parent != Path("/tmp"):
                parent.chmod(parent.stat().st_mode | 0o011)
    command = "c-chirpserver00001"
    running = Deferred.fromCoroutine(laptop.run(*words, command=command))
    await _appears(found, lambda: laptop.output("stderr"))
    yield int(found.read_text())
    laptop.operations.signal({"command": command, "signal": "KILL"}, ignore)
    await running


async def _appears(file: Path, said: Callable[[], bytes]) -> None:
    from twisted.internet import reactor

    for _ in range(300):
        if file.exists() and file.read_text().strip():
            return
        await deferLater(reactor, 0.1)
    raise AssertionError(f"chirp_server did not say its port: {said()!r}")


@pytest_twisted.ensureDeferred
async def test_a_file_there_and_back(laptop: Laptop, port: int) -> None:
    source = laptop.host / "data"
    source.write_bytes(os.urandom(3_000_000))
    request = {"vm": "lap", "source": str(source), "destination": "far/away/data", "chirp_port": port}
    done = await laptop.operations.put(request, ignore)
    assert (done["files"], done["bytes"]) == (1, 3_000_000)
    assert (laptop.home / "far/away/data").read_bytes() == source.read_bytes()
    assert [path.name for path in (laptop.home / "far/away").iterdir() if path.name != ".__acl"] == ["data"]

    back = laptop.host / "new" / "back"
    request = {"vm": "lap", "source": "far/away/data", "destination": str(back), "chirp_port": port}
    done = await laptop.operations.get(request, ignore)
    assert done["seconds"] > 0
    assert back.read_bytes() == source.read_bytes()
    assert list(back.parent.iterdir()) == [back]


@pytest_twisted.ensureDeferred
async def test_a_directory_there_and_back(laptop: Laptop, port: int) -> None:
    tree = laptop.host / "tree"
    (tree / "below").mkdir(parents=True)
    (tree / "below" / "one").write_text("1\n")
    (tree / "empty").write_text("")
    request = {"vm": "lap", "source": str(tree), "destination": "tree", "chirp_port": port}
    assert (await laptop.operations.put(request, ignore))["files"] == 2
    request = {"vm": "lap", "source": "tree", "destination": str(laptop.host / "back"), "chirp_port": port}
    await laptop.operations.get(request, ignore)
    assert (laptop.host / "back/below/one").read_text() == "1\n"
    assert (laptop.host / "back/empty").exists()


@pytest_twisted.ensureDeferred
async def test_what_cannot_be_copied_is_one_sentence(laptop: Laptop, port: int) -> None:
    out = {"vm": "lap", "source": "nothing", "destination": str(laptop.host / "x"), "chirp_port": port}
    with pytest.raises(TransferError, match=r"chirp_get says: .*No such file"):
        await laptop.operations.get(out, ignore)
    assert list(laptop.host.iterdir()) == []
    with pytest.raises(ConfigError, match="must be a relative path"):
        await laptop.operations.get({**out, "source": "../../etc/passwd"}, ignore)
    with pytest.raises(TransferError, match="there is no"):
        request = {"vm": "lap", "source": str(laptop.host / "none"), "destination": "x", "chirp_port": port}
        await laptop.operations.put(request, ignore)
    with pytest.raises(Refused, match="No VM"):
        await laptop.operations.get({**out, "vm": "cellar"}, ignore)


@pytest_twisted.ensureDeferred
async def test_tools_that_are_not_there(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(laptop.host))
    request = {"vm": "lap", "source": "x", "destination": str(laptop.host / "x"), "chirp_port": 1}
    with pytest.raises(ConfigError, match="there is no chirp_get on PATH"):
        await laptop.operations.get(request, ignore)
