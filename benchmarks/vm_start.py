"""How soon a VM answers: warm start, cold boot and return from a saved state, against QEMU by hand and cloud-init.

Ours are from the request to the host agent until its guest agent has answered; a saved VM's until a new command has
run in it. `plain QEMU boot` is the same image by hand, until its agent waits for settings. `cloud-init` is a Debian
with systemd, until cloud-init has run a user's script (the image of the project's own test of contextualisation). The
limit is QEMU's `-incoming` of the same template with the same command line, until the guest runs: no agent, no answer;
once as QEMU alone does it, with the memory in the state, and once with the memory mapped from a file, as ours is.
All in turn; QEMU has the lowest priority in each. `template_s` is the first start, which boots the template.

The short form has warm starts and the limit only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import psutil

from benchmarks import SHORT
from benchmarks.agent import START_DEADLINE, VM, Agent, host_agent
from benchmarks.cpu import cpu_seconds
from benchmarks.peers import by_hand
from benchmarks.peers.packages import Unavailable
from benchmarks.report import OURS, p99, rounds_of, show, timed
from common.errors import VMwrapperError
from host_agent.hypervisors.images import DEFAULT_IMAGE, Image, find_image, load_image
from host_agent.hypervisors.qemu_machine import TEMPLATE_DISK
from host_agent.hypervisors.qemu_templates import FOLDER, MEMORY, STATE
from vm_images.builder import build_image
from vm_images.cache import Cache, default_cache
from vm_images.recipe import load_recipe

ROUNDS = 7 if SHORT else 5
CLOUD_ROUNDS = (0, 1)  # minutes each, emulated
COLD, SAVED, PLAIN = "our cold boot", "our return from a saved state", "plain QEMU boot"
CLOUD, LIMIT = "systemd, cloud-init", "limit: QEMU -incoming"
MAPPED = "the same, memory mapped"
CLOUD_RECIPE = Path(__file__).parents[1] / "tests" / "vm" / "recipes" / "cloud.toml"


def run() -> dict[str, float]:
    """Measure; five minutes where VMs are emulated, half a one in the short form."""
    with tempfile.TemporaryDirectory(prefix="vmwrapper-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        image = _own_copy(folder)
        agent = stack.enter_context(host_agent(folder / "warm", env={"VMWRAPPER_WARM_START": "1"}))
        template_s = timed(lambda: _start(agent, image))
        argv = psutil.Process(agent.call("vms")["vms"][0]["pid"]).cmdline()
        agent.call("stop_vm", vm=VM)
        (template,) = [file.parent for file in (folder / "images" / FOLDER).glob(f"*/{STATE}")]
        disk, state = template / TEMPLATE_DISK, template / STATE
        mapped = (template / MEMORY).exists()
        whole = by_hand.whole_state(argv, disk, state, folder) if mapped else state
        cpu: dict[str, list[float]] = {OURS: [], LIMIT: [], **({MAPPED: []} if mapped else {})}

        def limit(name: str, like: list[str], state: Path) -> float:
            seconds, spent = by_hand.incoming(like, disk, state, folder)
            cpu[name].append(spent)
            return seconds

        work: dict[str, Callable[[], float]] = {
            OURS: lambda: _started(agent, image, cpu[OURS]),
            LIMIT: lambda: limit(LIMIT, by_hand.without_memory_file(argv), whole),
        }
        if mapped:
            work[MAPPED] = lambda: limit(MAPPED, argv, state)
        missing: dict[str, str] = {}
        cloud: Image | None = None
        if not SHORT:
            cold = stack.enter_context(host_agent(folder / "cold", env={"VMWRAPPER_WARM_START": "0"}))
            work[SAVED] = lambda: _saved_and_again(agent, image)
            work[COLD] = lambda: _started(cold, image, [])
            work[PLAIN] = lambda: by_hand.plain_boot(image, folder)
            try:
                cloud = _cloud_image(folder)
                work[CLOUD] = lambda: by_hand.cloud_init_boot(cloud, folder) if cloud is not None else 0.0
            except Unavailable as reason:
                missing[CLOUD] = str(reason)
        times: dict[str, list[float]] = {each: [] for each in work}
        for number in rounds_of(ROUNDS):
            for each, action in work.items():
                if each == CLOUD and (each in missing or number not in CLOUD_ROUNDS):
                    continue
                try:
                    times[each].append(action())
                except RuntimeError as error:
                    if each != CLOUD:
                        raise
                    missing[each] = " ".join(str(error).split())[-200:]
        together = [_three_at_once(agent, image) for _ in range(0 if SHORT else 3)]
    times = {each: values for each, values in times.items() if values}
    show("until the guest answers; ours is the warm start", times, "s", missing=missing)
    show("QEMU's CPU time by then", cpu, "s")
    found = _metrics(times, template_s, together)
    for name, key in ((LIMIT, "warm_cpu_ratio_to_limit"), (MAPPED, "warm_cpu_ratio_to_mapped")):
        if name in cpu:
            found[key] = median(cpu[OURS]) / median(cpu[name])
    return found


def _own_copy(folder: Path) -> Image:
    """Of the default image: its templates are made here, and go with it."""
    found = find_image(DEFAULT_IMAGE)
    place = folder / "images" / found.name
    place.mkdir(parents=True)
    for file in found.directory.iterdir():
        if file.stat().st_dev == place.stat().st_dev:
            os.link(file, place / file.name)
        else:
            shutil.copyfile(file, place / file.name)
    return load_image(place)


def _cloud_image(folder: Path) -> Image:
    try:
        return build_image(load_recipe(str(CLOUD_RECIPE)), folder / "cloud", Cache(default_cache()))
    except VMwrapperError as error:
        raise Unavailable(f"its image cannot be built: {error.explain()}") from None


def _start(agent: Agent, image: Image, name: str = VM) -> None:
    agent.start_vm(name, image=str(image.directory))


def _started(agent: Agent, image: Image, cpu: list[float]) -> float:
    """Seconds; and into the list, the CPU time that QEMU has used by then."""
    seconds = timed(lambda: _start(agent, image))
    cpu.append(cpu_seconds([agent.call("vms")["vms"][0]["pid"]]))
    agent.call("stop_vm", vm=VM)
    return seconds


def _saved_and_again(agent: Agent, image: Image) -> float:
    _start(agent, image)
    agent.call("save_vm", vm=VM)

    def again() -> None:
        agent.call("resume_vm", vm=VM)
        agent.run("true")

    seconds = timed(again)
    agent.call("stop_vm", vm=VM)
    return seconds


def _three_at_once(agent: Agent, image: Image) -> float:
    names = [f"{VM}-{number}" for number in range(3)]

    def all_three() -> None:
        request = {"directory": str(agent.folder / "vms"), "image": str(image.directory)}
        answers = [agent.client.begin("start_vm", {**request, "vm": name}) for name in names]
        for answer in answers:
            answer.wait(time.monotonic() + START_DEADLINE)

    seconds = timed(all_three)
    for name in names:
        agent.call("stop_vm", vm=name)
    return seconds


def _metrics(times: dict[str, list[float]], template_s: float, together: list[float]) -> dict[str, float]:
    middle = {name: median(values) for name, values in times.items()}
    warm = middle[OURS]
    found = {"warm_s": warm, "warm_p99_s": p99(times[OURS]), "warm_ratio_to_limit": warm / middle[LIMIT]}
    found["template_s"] = template_s
    if MAPPED in middle:
        found["warm_ratio_to_mapped"] = warm / middle[MAPPED]
    if CLOUD in middle:
        found["warm_ratio_to_cloud_init"] = warm / middle[CLOUD]
    if not SHORT:
        found["warm_ratio_to_plain_boot"] = warm / middle[PLAIN]
        found["cold_s"], found["cold_ratio_to_plain_boot"] = middle[COLD], middle[COLD] / middle[PLAIN]
        found["warm_to_cold"] = warm / middle[COLD]
        found["saved_and_again_s"] = middle[SAVED]
        found["three_to_one"] = median(together) / warm
    return found
