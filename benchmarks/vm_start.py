"""Warm starts against a cold boot, of the default image until the guest agent answers, through the host agent.

`template_s` is the first start, which boots the template and then starts a clone of it; `warm_s` the median of five
clones one after another; `three_at_once_s` until the last of three answers. The goals: `warm_s` 1.5 s, `warm_to_cold`
0.2, `three_to_one` 2.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, gatherResults

from host_agent.agent import build_host_agent
from host_agent.hypervisors.images import DEFAULT_IMAGE, Image, find_image, load_image
from host_agent.hypervisors.qemu import QemuHypervisor
from host_agent.state import open_state

reactor: Any = _reactor
DEADLINE = 300.0  # seconds for one start


async def _start(agent: Any, image: Image, folder: Path, name: str) -> tuple[float, Any]:
    began = time.perf_counter()
    vm = await agent._vms.start(name, image, folder, deadline=DEADLINE, watch=lambda state, reason: None)
    return time.perf_counter() - began, vm


async def _measure(folder: Path) -> dict[str, float]:
    os.environ["VMWRAPPER_RUNTIME"] = str(folder / "run")
    found = find_image(DEFAULT_IMAGE)
    place = folder / "images" / found.name
    place.mkdir(parents=True)
    for file in found.directory.iterdir():
        os.link(file, place / file.name) if _same_disk(file, place) else shutil.copyfile(file, place / file.name)
    image = load_image(place)
    results: dict[str, float] = {}
    for warm in (False, True):
        agent = build_host_agent(reactor, QemuHypervisor(reactor, warm=warm), open_state(None), stopped=lambda: None)
        await agent.start()
        if not warm:
            times = []
            for number in range(3):
                seconds, vm = await _start(agent, image, folder, f"cold{number}")
                times.append(seconds)
                await agent._vms.stop(vm)
            results["cold_s"] = median(times)
        else:
            results["template_s"], vm = await _start(agent, image, folder, "template")
            await agent._vms.stop(vm)
            times = []
            for number in range(5):
                seconds, vm = await _start(agent, image, folder, f"warm{number}")
                times.append(seconds)
                await agent._vms.stop(vm)
            results["warm_s"] = median(times)
            began = time.perf_counter()
            await gatherResults([Deferred.fromCoroutine(_start(agent, image, folder, f"m{n}")) for n in range(3)])
            results["three_at_once_s"] = time.perf_counter() - began
        await agent.shut_down()
    results["warm_to_cold"] = results["warm_s"] / results["cold_s"]
    results["three_to_one"] = results["three_at_once_s"] / results["warm_s"]
    return results


def _same_disk(one: Path, other: Path) -> bool:
    return one.stat().st_dev == other.stat().st_dev


def run() -> dict[str, float]:
    """Measure; about a minute where VMs are emulated."""
    results: dict[str, float] = {}
    failures: list[object] = []

    async def go() -> None:
        with tempfile.TemporaryDirectory(prefix="vmwrapper-bench-") as folder:
            results.update(await _measure(Path(folder)))

    def begin() -> None:
        done = Deferred.fromCoroutine(go())
        done.addErrback(failures.append).addBoth(lambda _: reactor.stop())

    reactor.callWhenRunning(begin)
    reactor.run()
    if failures:
        raise RuntimeError(str(failures[0]))
    return results
