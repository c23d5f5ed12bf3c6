from __future__ import annotations

import subprocess

import pytest_twisted
from twisted.internet import reactor

from host_agent.hypervisors.process_end import process_end


@pytest_twisted.ensureDeferred
async def test_the_end_of_a_process_is_seen() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        end = process_end(reactor, process.pid)
        assert not end.called
        process.kill()
        await end.addTimeout(30, reactor)


@pytest_twisted.ensureDeferred
async def test_nobody_waits_for_a_process_that_is_gone() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    await process_end(reactor, process.pid).addTimeout(30, reactor)


def test_a_wait_can_be_given_up() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        end = process_end(reactor, process.pid)
        end.addErrback(lambda _: None)
        end.cancel()
        assert end.called
        process.kill()
