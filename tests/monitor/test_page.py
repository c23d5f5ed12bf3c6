"""The page in a real browser, with a real host agent and real guest agents."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, Page

from tests.brokers import RunningBroker, free_port
from tests.system.agent_process import AgentProcess, agent_process

from .conftest import MonitorProcess, looking, monitor_process

HTML = "<img src=x onerror=\"document.title='taken over'\"><b>bold</b>"


def test_a_command_is_watched_from_its_start_to_its_end(
    browser: Browser, agent: AgentProcess, box: Path, monitor: MonitorProcess
) -> None:
    with looking(browser, monitor.url) as looked:
        page = looked.page
        looked.see("box", "#guests")
        script = "echo one; while [ ! -e go ]; do sleep 0.1; done; echo two; exit 3"
        agent.begin("box", "c-watched", script)
        row = page.locator("#commands tr", has_text="c-watched")
        row.get_by_text("running").wait_for()
        row.click()
        looked.see("one", "#stdout")
        assert "two" not in (page.locator("#stdout").text_content() or "")
        looked.keep("command")
        (box / "go").touch()
        looked.see("two", "#stdout")
        looked.see("ended with exit code 3", "#detail-trouble")
        page.keyboard.press("Escape")
        row.get_by_text("exit 3", exact=True).wait_for()
        assert row.get_attribute("class") == "red"
        looked.see("vmctl trace c-watched", "#troubles")
        looked.see("command_ended", "#events tbody")
    assert 'outcome="exited"' in monitor.metrics()


def test_a_killed_guest_turns_red_with_its_reason(
    browser: Browser, agent: AgentProcess, box: Path, monitor: MonitorProcess
) -> None:
    home = agent.start_vm("second")
    with looking(browser, monitor.url) as looked:
        row = looked.page.locator("#guests tr", has_text="second")
        row.get_by_text("running, agent present").wait_for()
        victims = [p for p in agent.left_over() if str(home) in " ".join(p.cmdline())]
        for victim in victims:
            try:
                os.kill(victim.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # its process 1 took it along
        psutil.wait_procs(victims, 10)
        looked.count("#guests tr.red", 1)
        assert "second" in (looked.page.locator("#guests tr.red").text_content() or "")
        looked.see("The VM second", "#troubles")
        looked.see("vmctl stop second", "#troubles")
        assert looked.page.locator("#guests tbody tr").first.get_attribute("class") == "red"  # the worst first
        looked.keep("killed-guest")
    agent.call("stop_vm", vm="second")


def test_filter_and_keyboard(browser: Browser, agent: AgentProcess, box: Path, monitor: MonitorProcess) -> None:
    agent.start_vm("alpha")
    with looking(browser, monitor.url) as looked:
        page = looked.page
        looked.see("box", "#guests")
        page.keyboard.press("/")
        page.keyboard.type("ALPHA")
        looked.count("#guests tbody tr", 1)
        assert page.locator("#guests-count").text_content() == "1 of 2"
        page.keyboard.press("Escape")
        looked.count("#guests tbody tr", 2)
        page.locator("#guests tbody tr").first.focus()
        page.keyboard.press("ArrowDown")
        assert "box" in (page.locator("#guests tr:focus").text_content() or "")
        page.keyboard.press("Enter")
        assert page.locator("#detail-title").text_content() == "box"
        page.keyboard.press("Escape")
        page.locator("#guests select").select_option("paused")
        looked.count("#guests tbody tr", 0)
        agent.call("pause_vm", vm="box")
        looked.see("paused", "#guests tbody")
    agent.call("stop_vm", vm="alpha")


def test_what_others_say_is_text(browser: Browser, agent: AgentProcess, box: Path, monitor: MonitorProcess) -> None:
    with looking(browser, monitor.url) as looked:
        agent.begin("box", "c-html", f"cat <<'E'\n{HTML}\nE\nsleep 300")
        row = looked.page.locator("#commands tr", has_text="c-html")
        row.filter(has_text=HTML[:12]).wait_for()
        row.click()
        looked.see("<b>bold</b>", "#stdout")
        assert looked.page.locator("main img, dialog img, main b, dialog b").count() == 0
        assert looked.page.title() == "VMwrapper monitor"
        agent.call("signal", command="c-html", signal="KILL")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(browser: Browser, agent: AgentProcess, box: Path, monitor: MonitorProcess, scheme: str) -> None:
    with looking(browser, monitor.url, color_scheme=scheme) as looked:
        looked.see("box", "#guests")
        looked.page.set_viewport_size({"width": 390, "height": 800})
        assert axe_finds(looked.page) == []
        # Nothing sticks out to the side.
        assert looked.page.evaluate("document.documentElement.scrollWidth") <= 390
        looked.keep(f"phone-{scheme}")


def axe_finds(page: Page) -> list[str]:
    """What axe-core, which knows the rules of WCAG 2, has against the page: roles, names, contrast, order."""
    found = Axe().run(page).response["violations"]
    return [f"{each['id']}: {node['html'][:200]}" for each in found for node in each["nodes"]]


def test_axe_finds_nothing_wrong_with_what_is_red(
    browser: Browser, agent: AgentProcess, box: Path, monitor: MonitorProcess
) -> None:
    agent.call("run", vm="box", argv=["sh", "-c", "exit 3"])
    with looking(browser, monitor.url, color_scheme="dark") as looked:
        looked.see("ended with exit code 3", "#troubles")
        assert axe_finds(looked.page) == []
        looked.page.emulate_media(color_scheme="light")
        looked.page.locator("#commands tr", has_text="exit 3").first.click()
        looked.see("ended with exit code 3", "#detail-trouble")
        assert axe_finds(looked.page) == []


def test_a_screen_reader_finds_names_and_roles(
    browser: Browser, agent: AgentProcess, box: Path, monitor: MonitorProcess
) -> None:
    with looking(browser, monitor.url) as looked:
        page = looked.page
        page.get_by_role("status").first.get_by_text("live").wait_for()
        for name in ("Guests", "Commands", "Copies", "Checkpoints", "Brokers", "Hosts", "Events"):
            page.get_by_role("heading", name=name).first.wait_for()
        table = page.get_by_role("table", name="Guests")
        table.get_by_role("cell", name="box").wait_for()
        assert table.get_by_role("columnheader").count() == 10
        page.get_by_role("searchbox", name="Filter").wait_for()
        unnamed = page.evaluate(
            "[...document.querySelectorAll('input, select, button')].filter((each) => "
            "!each.getAttribute('aria-label') && !each.textContent && !each.labels?.length).length"
        )
        assert unnamed == 0


def test_the_page_stays_up_when_a_host_agent_dies(browser: Browser, tmp_path: Path) -> None:
    with (
        agent_process(tmp_path) as agent,
        monitor_process(tmp_path) as monitor,
        looking(browser, monitor.url) as looked,
    ):
        agent.start_vm("box")
        looked.see("box", "#guests")
        agent.kill()
        looked.count("#hosts tbody tr", 0)  # no process, no host
        agent.start()
        looked.see("box", "#guests")
        looked.see("in the host agent", "#brokers")
        looked.keep("monitor")


def test_control_asks_the_host_agent(browser: Browser, agent: AgentProcess, box: Path, monitor: MonitorProcess) -> None:
    with looking(browser, monitor.url) as looked:
        page = looked.page
        page.locator("#guests tr", has_text="box").last.click()
        page.get_by_role("button", name="Ping").click()
        looked.see("Ping: answers in", "#detail-answer")
        page.get_by_role("button", name="Pause").click()
        looked.see("Pause: done", "#detail-answer")
        looked.see("paused", "#detail-fields")
        page.get_by_role("button", name="Resume").click()
        looked.see("Resume: done", "#detail-answer")
        page.keyboard.press("Escape")
        agent.begin("box", "c-long", "sleep 300")
        page.locator("#commands tr", has_text="c-long").click()
        page.get_by_role("button", name="Signal KILL", exact=True).click()
        looked.see("was ended by signal KILL", "#detail-trouble")


def test_without_control_there_are_no_buttons(browser: Browser, folder: Path, agent: AgentProcess, box: Path) -> None:
    with monitor_process(folder) as monitor, looking(browser, monitor.url) as looked:
        looked.page.locator("#guests tr", has_text="box").last.click()
        looked.page.locator("#detail-title").get_by_text("box").wait_for()
        assert looked.page.locator("#detail-control button").count() == 0


def test_brokers_that_answer_and_brokers_that_do_not(browser: Browser, activemq: RunningBroker, tmp_path: Path) -> None:
    good = activemq.plan.directory / "without-advisories.toml"
    good.write_text(activemq.plan.monitor_settings.read_text().replace("advisories = true", ""))
    good.chmod(0o600)
    wrong, dead = tmp_path / "wrong.toml", tmp_path / "dead.toml"
    (tmp_path / "wrong.passcode").write_text("<b>wrong</b>")
    for file, port in ((wrong, activemq.port), (dead, free_port())):
        file.write_text(
            f'format = 1\nkind = "activemq"\nbroker = "localhost:{port}"\n'
            'login = "monitor"\npasscode_file = "wrong.passcode"\n'
        )
        file.chmod(0o600)
    options = [word for file in (good, dead) for word in ("--broker", str(file))]
    with monitor_process(tmp_path, *options) as monitor, looking(browser, monitor.url) as looked:
        row = looked.page.locator("#brokers tbody tr:not(.red)")
        row.get_by_text("activemq").wait_for()
        assert "unknown" in (row.text_content() or "")  # its connections: the file does not say that it may ask
        looked.see("cannot be asked: cannot be reached: connection refused", "#troubles")
        row.click()
        looked.see("vmwrapper.guest.host-a-g1", "#detail-fields")
        assert 'vmwrapper_broker_up{broker="localhost:' in monitor.metrics().replace("127.0.0.1:", "localhost:")
    with monitor_process(tmp_path, "--broker", str(wrong)) as monitor, looking(browser, monitor.url) as looked:
        looked.see("refuses the login 'monitor'", "#troubles")
