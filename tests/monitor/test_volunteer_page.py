"""The page for one host: the wrapper tells the BOINC client where it is, and a browser shows what the VM does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from host_agent.wrapper.boinc.shared_memory import Channel
from host_agent.wrapper.boinc.testing import ClientSide
from tests.system.agent_process import AgentProcess

from .conftest import DEADLINE, ROOT, SCREENSHOTS

JOB = """<job_desc><task>
  <virtualmachine>box</virtualmachine>
  <application>/bin/sh</application>
  <command_line>-c 'echo 0.4 &gt; done; while [ ! -e {go} ]; do sleep 0.1; done'</command_line>
  <fraction_done_filename>done</fraction_done_filename>
</task></job_desc>
"""


def address_in(client: ClientSide) -> str:
    """As the application tells it; the client sends its heart-beats meanwhile."""
    deadline = time.monotonic() + DEADLINE
    while True:
        client.beat()
        said = client.memory.take(Channel.GRAPHICS_REPLY)
        if said:
            found = re.fullmatch(r"\s*<web_graphics_url>(.*)</web_graphics_url>\s*", said)
            assert found is not None, said
            return found[1]
        assert time.monotonic() < deadline, (client.slot / "stderr.txt").read_text()
        time.sleep(0.2)  # the memory gives no event to wait for


@pytest.fixture
def job(tmp_path: Path) -> Iterator[tuple[ClientSide, Path]]:
    """A wrapper that runs a task in a VM, and the file that ends the task."""
    slot, go = tmp_path / "slot", tmp_path / "go"
    slot.mkdir()
    (slot / "job.xml").write_text(JOB.format(go=go))
    client = ClientSide(slot)
    environment = {
        **os.environ, "VMWRAPPER_RUNTIME": str(tmp_path / "run"), "VMWRAPPER_HYPERVISOR": "process",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    wrapper = subprocess.Popen([sys.executable, "-m", "host_agent.wrapper.main"], cwd=slot, env=environment)
    try:
        yield client, go
    finally:
        wrapper.terminate()
        wrapper.wait(DEADLINE)


def test_the_client_learns_the_address_and_the_volunteer_sees_the_task(
    browser: Browser, job: tuple[ClientSide, Path]
) -> None:
    client, go = job
    url = address_in(client)
    page = browser.new_page(viewport={"width": 800, "height": 700})
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(url)
    box = page.locator("#vms .vm", has_text="box")
    until = time.monotonic() + DEADLINE
    while not (box.get_by_text("is running").count() and page.get_by_text("% done").count()):
        client.beat()
        assert time.monotonic() < until, page.locator("main").text_content()
        page.wait_for_timeout(200)
    assert "in box: running" in (page.locator("#work").text_content() or "")
    assert "while [" not in (page.locator("main").text_content() or "")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "volunteer.png")
    go.touch()
    page.close()
    assert complaints == []
    assert [each for each in requests if not each.startswith(url)] == []


def test_nobody_else_finds_it(agent: AgentProcess) -> None:
    url = agent.call("open_page")["url"]
    assert agent.call("open_page")["url"] == url  # one page
    site = url.rpartition("/")[0].rpartition("/")[0]
    with urllib.request.urlopen(f"{url}state", timeout=DEADLINE) as answer:  # noqa: S310  (http)
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    for path, headers in (
        ("/", {}),
        ("/guess/", {}),
        ("/guess/state", {}),
        (url[len(site) :], {"Host": "evil.example"}),
    ):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            request = urllib.request.Request(f"{site}{path}", headers=headers)  # noqa: S310  (http)
            urllib.request.urlopen(request, timeout=DEADLINE)  # noqa: S310
