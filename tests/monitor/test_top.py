"""`vmctl top` with a real host agent: driven by textual's own pilot, and once in a real terminal."""

from __future__ import annotations

import asyncio
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from textual.widgets import DataTable, Static

from host_agent.monitor.top import TABLES, Top
from tests.system.agent_process import AgentProcess

from .conftest import DEADLINE, ROOT


def cells(app: Top, name: str) -> list[str]:
    table = app.query_one(f"#table-{name}", DataTable)
    return ["|".join(str(cell) for cell in table.get_row_at(index)) for index in range(table.row_count)]


async def until(true: Callable[[], bool]) -> None:
    """The app draws by its own clock, so it is looked at."""
    deadline = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < deadline, "it is not shown"
        await asyncio.sleep(0.05)


def test_tables_troubles_and_the_filter(
    agent: AgentProcess, box: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMWRAPPER_RUNTIME", str(folder / "run"))
    agent.call("run", vm="box", argv=["sh", "-c", "exit 3", "[red]not markup[/red]"], command="c-top")

    async def look() -> None:
        app = Top(0.2)
        async with app.run_test(size=(200, 40)) as pilot:
            await until(lambda: any(row.startswith("box|running, agent present") for row in cells(app, "guests")))
            await pilot.press("2")
            await until(lambda: any("exit 3|box" in row and "c-top" in row for row in cells(app, "commands")))
            assert any("[red]not markup[/red]" in row for row in cells(app, "commands"))
            troubles = str(app.query_one("#troubles", Static).render())
            assert "sh in box ended with exit code 3" in troubles and "vmctl trace c-top" in troubles
            await pilot.press("slash", *"nothing")
            await until(lambda: cells(app, "commands") == [])
            await pilot.press("escape")
            await until(lambda: len(cells(app, "commands")) >= 1)
            for number, name in enumerate(TABLES, start=1):
                await pilot.press(str(number))
                if name in ("brokers", "hosts", "events"):
                    await until(lambda name=name: len(cells(app, name)) >= 1)  # type: ignore[misc]
            await pilot.press("q")

    # In a thread of its own: Playwright keeps an event loop in this one.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: asyncio.run(look())).result()


def test_in_a_terminal(agent: AgentProcess, box: Path, folder: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "VMWRAPPER_RUNTIME": str(folder / "run"), "TERM": "xterm-256color", "COLUMNS": "120"}
    process = subprocess.Popen(
        [sys.executable, "-m", "host_agent.vmctl.main", "top"],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=ROOT,
    )  # fmt: skip
    os.close(theirs)
    try:
        shown = b""
        deadline = time.monotonic() + DEADLINE
        while b"box" not in shown and time.monotonic() < deadline:
            if select.select([ours], [], [], 1.0)[0]:
                shown += os.read(ours, 65536)
        assert b"box" in shown
        os.write(ours, b"q")
        while select.select([ours], [], [], DEADLINE)[0]:
            try:
                os.read(ours, 65536)
            except OSError:
                break  # its end of the terminal is closed
        assert process.wait(DEADLINE) == 0
    finally:
        process.kill()
        os.close(ours)
