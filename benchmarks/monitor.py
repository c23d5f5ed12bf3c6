"""The monitor's page with many guests and many events: `python -m benchmarks monitor`."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import attrs
import psutil

GUESTS = 1000
RATE = 100.0
SECONDS = 60.0
LOOKS = 10
START_SECONDS = 60.0
PAUSE, WORK = 0.1, 50_000  # of the calibration: some 3 ms of work
HOSTS = 20  # that are heard through a broker


@attrs.frozen
class Measured:
    """CPU is a share of one core; the browser's page has a process of its own."""

    guests: int
    events_per_s: float
    monitor_cpu: float
    monitor_bytes: int
    browser_cpu: float  # of the page's process
    browser_all_cpu: float  # of all its processes, with the one that paints
    browser_bytes: int
    event_to_screen_s: float  # for 99 of 100
    event_to_screen_median_s: float
    filter_s: float  # from a key to the filtered table
    metrics_s: float
    stretch: float  # by how much waits took longer than they would on a quiet machine
    slowdown: float  # by how much more CPU time the same work took than in the best moment


class Calibration:
    """The same small piece of work again and again meanwhile: what it takes tells how busy the machine is."""

    def __init__(self) -> None:
        self._cpu: list[float] = []
        self._wall: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Calibration:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            due = time.monotonic() + PAUSE
            self._stop.wait(PAUSE)
            began = time.thread_time()
            sum(number * number for number in range(WORK))
            self._cpu.append(time.thread_time() - began)
            self._wall.append(time.monotonic() - due)

    @property
    def stretch(self) -> float:
        return max(1.0, statistics.median(self._wall) / min(self._cpu))

    @property
    def slowdown(self) -> float:
        return max(1.0, statistics.median(self._cpu) / min(self._cpu))


_WATCH = """
() => {
  window.seen = new Map();
  new MutationObserver(() => {
    const now = Date.now() / 1000;
    for (const cell of document.querySelectorAll('#events tbody td:nth-child(4)')) {
      if (!window.seen.has(cell.textContent)) window.seen.set(cell.textContent, now);
    }
  }).observe(document.querySelector('#events tbody'), {childList: true, subtree: true, characterData: true});
}
"""
_ALL = """
(guests) => [...document.querySelectorAll('#summary dd')].some((each) => each.textContent.includes(`of ${guests} `))
"""
_FILTER = """
async (word) => {
  const began = performance.now();
  const box = document.getElementById('filter');
  box.value = word;
  box.dispatchEvent(new Event('input'));
  for (;;) {
    const rows = document.querySelectorAll('#guests tbody tr');
    if (rows.length === 1 && rows[0].textContent.includes(word)) break;
    await new Promise(requestAnimationFrame);
  }
  return (performance.now() - began) / 1000;
}
"""


def measure(
    guests: int,
    rate: float,
    seconds: float,
    folder: Path,
    *,
    through_broker: bool = False,
    external: tuple[Path, Path] | None = None,
) -> Measured:
    """With a simulated host agent, or hosts that are heard through a broker, the real monitor and Debian's Chromium.

    `external`: settings of a host and of the monitor on a broker that runs; without, it is an embedded one.
    """
    from playwright.sync_api import sync_playwright

    environment = {**os.environ, "VMWRAPPER_RUNTIME": str(folder / "run"), "VMWRAPPER_MONITOR_PASSCODE": "any"}
    many = ["--guests", str(guests), "--rate", str(rate)]
    if through_broker:
        more = ["--through", str(external[0])] if external is not None else []
        host = _start(["benchmarks.simulated_site", str(folder), "--hosts", str(HOSTS), *many, *more], environment)
    else:
        host = _start(["benchmarks.simulated_host", *many, "--seconds", "600"], environment)
    assert host.stdout is not None
    told = json.loads(host.stdout.readline())
    words = ["host_agent.vmctl.main", "monitor", "--listen", "127.0.0.1:0"]
    if through_broker:
        words += ["--broker", str(external[1]) if external is not None else f"embedded://127.0.0.1:{told['port']}"]
    monitor = _start(words, environment)
    try:
        assert monitor.stdout is not None
        url = monitor.stdout.readline().strip()
        with sync_playwright() as playwright, Calibration() as calibration:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1300, "height": 1000})
            page.goto(url)
            page.wait_for_function(_ALL, arg=guests, timeout=START_SECONDS * 1000)
            page.evaluate(_WATCH)
            ours = [psutil.Process(os.getpid())]
            painters = [p for p in ours[0].children(recursive=True) if "chrom" in p.name()]
            renderers = [p for p in painters if "--type=renderer" in p.cmdline()]
            watched = {"monitor": [psutil.Process(monitor.pid)], "page": renderers, "browser": painters}
            before, began = {name: _cpu(group) for name, group in watched.items()}, time.monotonic()
            page.wait_for_timeout(seconds * 1000)
            passed = time.monotonic() - began
            cpu = {name: (_cpu(group) - before[name]) / passed for name, group in watched.items()}
            memory = {name: sum(p.memory_info().rss for p in group) for name, group in watched.items()}
            times = _times_of_site(folder) if through_broker else _times_of_host(folder)
            delays = _delays(page, times)
            filtered = statistics.median(page.evaluate(_FILTER, f"worker-{number:04}") for number in range(5))
            browser.close()
        scrapes = [_scrape(f"{url.partition('?')[0]}metrics") for _ in range(5)]
    finally:
        for process in (monitor, host):
            process.terminate()
            process.wait(START_SECONDS)
    return Measured(
        guests=guests,
        events_per_s=rate,
        monitor_cpu=round(cpu["monitor"], 3),
        monitor_bytes=memory["monitor"],
        browser_cpu=round(cpu["page"], 3),
        browser_all_cpu=round(cpu["browser"], 3),
        browser_bytes=memory["page"],
        event_to_screen_s=round(statistics.quantiles(delays, n=100)[98], 3),
        event_to_screen_median_s=round(statistics.median(delays), 3),
        filter_s=round(filtered, 3),
        metrics_s=round(statistics.median(scrapes), 4),
        stretch=round(calibration.stretch, 2),
        slowdown=round(calibration.slowdown, 2),
    )


def _start(module: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", *module]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


def _cpu(group: list[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in group))


def _delays(page: Any, times: dict[str, float]) -> list[float]:
    """How long after it happened each event was on the page."""
    # Without those that were there when the watch began.
    shown = dict(page.evaluate("() => [...window.seen].slice(50)"))
    found = [at - times[text] for text, at in shown.items() if text in times]
    assert len(found) >= LOOKS, f"only {len(found)} events were seen"
    return found


def _times_of_site(folder: Path) -> dict[str, float]:
    return dict(json.loads(line) for line in (folder / "events").read_text().splitlines())


def _times_of_host(folder: Path) -> dict[str, float]:
    from host_agent.control_client import ControlClient, read_endpoint

    times: dict[str, float] = {}
    client = ControlClient.connect(read_endpoint(folder / "run" / "agents" / "h-simulated.json"))
    since = max(0, client.call("events", {"since": -1, "wait_s": 0})["last"] - 3000)
    for _ in range(4):
        batch = client.call("events", {"since": since, "wait_s": 0})
        since = batch["last"]
        times.update({event["text"]: event["time"] for event in batch["events"]})
    client.close()
    return times


def _scrape(url: str) -> float:
    began = time.monotonic()
    with urllib.request.urlopen(url, timeout=START_SECONDS) as answer:  # noqa: S310  (http)
        answer.read()
    return time.monotonic() - began


def run() -> dict[str, float]:
    """The long form: through a control interface, and through a broker."""
    found: dict[str, float] = {}
    for name, through_broker in (("", False), ("broker_", True)):
        with tempfile.TemporaryDirectory(prefix="vmwrapper-bench-") as folder:
            measured = measure(GUESTS, RATE, SECONDS, Path(folder), through_broker=through_broker)
            found.update({f"{name}{key}": value for key, value in attrs.asdict(measured).items()})
    return found
