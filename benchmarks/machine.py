"""What machine this is: a line for the tables, and how QEMU can run guests on it."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from pathlib import Path

from host_agent.hypervisors.qemu import QEMU

_PROBE = """
from twisted.internet.task import react
from host_agent.hypervisors.kvm import KvmProbe
from host_agent.hypervisors.qemu import QEMU
def tell(why_not):
    print("emulated (TCG)" if why_not else "KVM")
react(lambda reactor: KvmProbe(reactor, QEMU).why_not().addCallback(tell))
"""


def machine() -> str:
    """One line: cores, processor, load, QEMU, accelerator."""
    try:
        words = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout.split()
        qemu = f"QEMU {words[3]}"
    except (OSError, subprocess.CalledProcessError, IndexError):
        qemu = "no QEMU"
    load = f"load {os.getloadavg()[1]:.0f}" if hasattr(os, "getloadavg") else "load unknown"
    return f"{os.cpu_count()} cores, {_processor()}, {load}, {qemu}, {accelerator()}"


@functools.cache
def accelerator() -> str:
    """`KVM`, `emulated (TCG)`, or that none is known."""
    # In a process of its own, because the probe needs the reactor.
    probe = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False)
    return probe.stdout.strip() or "no accelerator known"


def maker() -> str:
    """Of the processor, in its own word: `AuthenticAMD`, `GenuineIntel`."""
    return _cpuinfo("vendor_id") or platform.machine() or "unknown"


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")
