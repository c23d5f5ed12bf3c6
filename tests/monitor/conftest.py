"""The monitor as a process of its own, and a real browser that looks at it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.system.agent_process import AgentProcess, agent_process

DEADLINE = 60.0  # seconds
ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / "build" / "screenshots"


@attrs.define
class MonitorProcess:
    """`vmctl monitor` on a free port. `url` is what it printed, `site` the same without its token."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def site(self) -> str:
        return self.url.partition("?")[0]

    def metrics(self) -> str:
        with urllib.request.urlopen(f"{self.site}metrics", timeout=DEADLINE) as answer:  # noqa: S310  (http)
            return str(answer.read().decode())


@contextlib.contextmanager
def monitor_process(folder: Path, *options: str) -> Iterator[MonitorProcess]:
    """`folder/run` is the runtime directory of host agents."""
    argv = [sys.executable, "-m", "host_agent.vmctl.main", "monitor", "--listen", "127.0.0.1:0", *options]
    env = {**os.environ, "VMWRAPPER_RUNTIME": str(folder / "run")}
    path = folder / "monitor.log"
    with path.open("ab") as log:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, env=env, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, path.read_text()
        yield MonitorProcess(process, url, path)
        assert process.poll() is None, path.read_text()
    finally:
        process.terminate()
        process.wait(DEADLINE)
    assert "critical" not in path.read_text(), path.read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("monitor")


@pytest.fixture(scope="module")
def agent(folder: Path) -> Iterator[AgentProcess]:
    """A host agent whose guests are processes; one for a module, because each takes seconds to start."""
    with agent_process(folder) as made:
        yield made


@pytest.fixture(scope="module")
def monitor(folder: Path, agent: AgentProcess) -> Iterator[MonitorProcess]:
    """One that may be asked to do something."""
    with monitor_process(folder, "--control") as made:
        yield made


@pytest.fixture
def box(agent: AgentProcess) -> Iterator[Path]:
    """The home of a guest named `box`."""
    yield agent.start_vm("box")
    agent.call("stop_vm", vm="box")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium is not None, "make test installs Debian's chromium"
    with sync_playwright() as playwright:
        # As root, and in containers, Chromium's own sandbox cannot be made.
        made = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield made
        made.close()


@attrs.define
class Looked:
    """A page that is looked at, and what the browser had to say."""

    page: Page
    complaints: list[str] = attrs.field(factory=list)
    requests: list[str] = attrs.field(factory=list)

    def count(self, selector: str, number: int) -> None:
        """Wait until so many are there."""
        expect(self.page.locator(selector)).to_have_count(number, timeout=DEADLINE * 1000)

    def see(self, text: str, place: str = "main") -> None:
        """Wait until the text is there."""
        self.page.locator(place).get_by_text(text).first.wait_for(timeout=DEADLINE * 1000)

    def keep(self, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png")


@contextlib.contextmanager
def looking(browser: Browser, url: str, **options: Any) -> Iterator[Looked]:
    """Open the page in a browser of its own memory; in the end nothing may have been wrong."""
    site = url.partition("?")[0]
    context = browser.new_context(viewport={"width": 1300, "height": 1000}, **options)
    looked = Looked(context.new_page())
    page = looked.page
    page.on("console", lambda message: looked.complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: looked.complaints.append(str(error)))
    page.on("request", lambda request: looked.requests.append(request.url))
    try:
        page.goto(url)
        page.locator("#connection.live").wait_for(timeout=DEADLINE * 1000)
        yield looked
        assert looked.complaints == []
        assert [url for url in looked.requests if not url.startswith(site)] == []
    finally:
        context.close()
