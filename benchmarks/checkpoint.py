"""A live checkpoint of a VM whose program holds 32 MiB, against QEMU's own snapshots and a copy of the disk.

`bytes_ratio_to_dirty`: the checkpoint's file to what zstd makes of the guest's memory, read without the guest's help;
goal 1.2. `pause_s_per_256mb`: how long the guest stands still, goal 0.3 s. `restore_s`: from QEMU's end by SIGKILL to
a new command's output from the VM, which went back by itself. `snapshot_save_*`: QEMU's `snapshot-save` of the same VM,
which holds the guest from beginning to end. `cold_*`: a copy of the disk of a VM that stands still, without its memory.
The limit of the pause is the guest's memory, as it is, written to the disk by a bare program. There is no shorter form:
a single pause says little.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.internet.threads import blockingCallFromThread

from benchmarks.report import OURS, show
from host_agent.hypervisors.images import DEFAULT_IMAGE, find_image
from host_agent.hypervisors.qemu_machine import QemuMachine
from host_agent.hypervisors.qemu_packing import ZSTD

from .host import VM, Bench, reactor, with_guest
from .vm_states import SeenHypervisor

MEMORY_MB = 256
WORKS = "import os, time\nheld = os.urandom(32 << 20)\nprint('ready', flush=True)\ntime.sleep(100000)"
DEADLINE = 300.0
POLL = 0.02


def _execute(machine: QemuMachine, command: str, **arguments: Any) -> Any:
    """A command of QMP, from the thread that measures."""
    return _wait(lambda: machine._steered().execute(command, **arguments))


def _wait(action: Callable[[], Deferred[Any]]) -> Any:
    """Do it in the reactor's thread, and wait for it here."""
    return blockingCallFromThread(reactor, action)


def _begin_work(bench: Bench) -> None:
    heard: list[str] = []
    args = {"vm": VM, "argv": ["python3", "-c", WORKS], "stream": True}
    bench.client.start("run", args, lambda name, data: heard.append(name))
    until = time.monotonic() + DEADLINE
    while "output" not in heard:
        if bench.client.closed is not None or not bench.client.wait_until(until):
            raise RuntimeError("the program in the guest did not begin")


def _vm(bench: Bench) -> dict[str, Any]:
    (vm,) = bench.client.call("vms", deadline_s=DEADLINE)["vms"]
    return dict(vm)


def _allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def _memory(machine: QemuMachine, folder: Path) -> tuple[int, float]:
    """Bytes of the guest's memory when zstd has packed it, and the seconds to write it down as it is."""
    raw, written = folder / "memory", folder / "written"
    _execute(machine, "pmemsave", val=0, size=MEMORY_MB << 20, filename=str(raw))
    packed = subprocess.run([ZSTD, "-1", "-q", "-c", str(raw)], capture_output=True, check=True).stdout
    content = raw.read_bytes()
    raw.unlink()
    began = time.perf_counter()
    with written.open("wb", buffering=0) as file:
        file.write(content)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    written.unlink()
    return len(packed), seconds


def _snapshot_save(machine: QemuMachine) -> dict[str, float]:
    disk = machine.spec.directory / "disk.qcow2"
    (node,) = [each["inserted"]["node-name"] for each in _execute(machine, "query-block") if each["device"] == "disk"]
    before, began = _allocated(disk), time.perf_counter()
    _execute(machine, "snapshot-save", **{"job-id": "peer", "tag": "peer", "vmstate": node, "devices": [node]})

    async def ended() -> dict[str, Any]:
        while True:
            (job,) = [each for each in await machine._steered().execute("query-jobs") if each["id"] == "peer"]
            if job["status"] == "concluded":
                return dict(job)
            await deferLater(reactor, POLL)

    job = _wait(lambda: Deferred.fromCoroutine(ended()).addTimeout(DEADLINE, reactor))
    seconds = time.perf_counter() - began
    if "error" in job:
        raise RuntimeError(job["error"])
    _execute(machine, "job-dismiss", id="peer")
    os.sync()
    return {"snapshot_save_pause_s": seconds, "snapshot_save_MB": (_allocated(disk) - before) / 1e6}


def _one(bench: Bench) -> dict[str, float]:
    machine = SeenHypervisor.machine
    assert machine is not None
    _begin_work(bench)
    began = time.perf_counter()
    bench.client.call("checkpoint_vm", {"vm": VM}, deadline_s=DEADLINE)
    found = {"checkpoint_s": time.perf_counter() - began}
    found["pause_s_per_256mb"] = machine.stood_still * 256 / machine.spec.memory_mb
    (state,) = machine.spec.directory.glob("state-*")
    size = state.stat().st_size
    found["checkpoint_MB"] = size / 1e6
    packed, found["memory_write_s"] = _memory(machine, bench.folder)
    found["bytes_ratio_to_dirty"] = size / packed

    began, pid, epoch = time.perf_counter(), machine.pid, _vm(bench)["epoch"]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    while _vm(bench)["epoch"] == epoch:  # a command of the time before would be undone
        time.sleep(POLL)
    bench.run("true")
    found["restore_s"] = time.perf_counter() - began

    disk = machine.spec.directory / "disk.qcow2"
    _execute(machine, "stop")
    began = time.perf_counter()
    shutil.copyfile(disk, bench.folder / "copy")
    os.sync()
    found["cold_copy_s"], found["cold_copy_MB"] = time.perf_counter() - began, _allocated(disk) / 1e6
    _execute(machine, "cont")

    found |= _snapshot_save(machine)
    found["pause_ratio_to_snapshot_save"] = found["pause_s_per_256mb"] / found["snapshot_save_pause_s"]
    found["pause_ratio_to_limit"] = found["pause_s_per_256mb"] / found["memory_write_s"]
    return found


def run() -> dict[str, float]:
    """Measure; medians of three; half a minute where VMs are emulated."""
    rounds = with_guest(SeenHypervisor, find_image(DEFAULT_IMAGE), _one, rounds=3)

    def column(metric: str) -> list[float]:
        return [found[metric] for found in rounds]

    pauses = {OURS: column("pause_s_per_256mb"), "QEMU's snapshot-save": column("snapshot_save_pause_s")}
    pauses |= {"cold copy of the disk": column("cold_copy_s"), "limit: memory to disk": column("memory_write_s")}
    show("how long the guest stands still", pauses, "s")
    sizes = {OURS: column("checkpoint_MB"), "QEMU's snapshot-save": column("snapshot_save_MB")}
    show("what is written", {**sizes, "cold copy of the disk": column("cold_copy_MB")}, "MB")
    return {metric: median(column(metric)) for metric in rounds[0]}
