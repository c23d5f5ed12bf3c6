"""The default image: built with an empty cache, packed for sending, and started with 128 MB of memory.

Goals: `build_s` 120 (from packages that are near), `packed_mb` 60, `boot_128_s` 6 where VMs are emulated; medians of
three boots. `boot_cpu_s` is what QEMU took of the processor for a boot, which other load changes less than its time,
and `ratio_boot_to_kernel` the boot in units of the kernel's own part of it: what init, Python and the agent add.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

import attrs

from host_agent.hypervisors.images import Image, find_image
from host_agent.hypervisors.qemu import QemuHypervisor
from vm_images.builder import build_image
from vm_images.cache import Cache
from vm_images.package import pack_image
from vm_images.recipe import load_recipe

from .boot import one_boot
from .cpu import cpu_seconds
from .host import Bench, with_guest

MEMORY_MB = 128


def run() -> dict[str, float]:
    """Measure; some minutes, most of which packing takes."""
    with tempfile.TemporaryDirectory(prefix="vmwrapper-bench-") as folder:
        began = time.perf_counter()
        built = build_image(load_recipe("debian-minimal"), Path(folder) / "images", Cache(Path(folder) / "cache"))
        build_s = time.perf_counter() - began
        parts = [path for path in (built.disk, built.kernel, built.initrd) if path is not None]
        sizes = {f"{path.name.partition('.')[0]}_mb": path.stat().st_size / 1e6 for path in parts}
        packed = pack_image(built, Path(folder) / "package").stat().st_size / 1e6
        image: Image = attrs.evolve(find_image(built.name, built.directory.parent), memory_mb=MEMORY_MB)
        rounds = with_guest(lambda reactor: QemuHypervisor(reactor, warm=False), image, _boot, rounds=3)
    boot = {metric: median(found[metric] for found in rounds) for metric in rounds[0]}
    return {"build_s": build_s, **sizes, "packed_mb": packed, **boot}


def _boot(bench: Bench) -> dict[str, float]:
    (vm,) = bench.client.call("vms")["vms"]
    cpu = cpu_seconds([vm["pid"]])
    found = one_boot(bench)
    return {
        "boot_128_s": found["cold_boot_s"],
        "kernel_s": found["kernel_only_s"],
        "ratio_boot_to_kernel": found["cold_boot_s"] / found["kernel_only_s"],
        "boot_cpu_s": cpu,
    }
