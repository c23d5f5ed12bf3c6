"""QEMU without a host agent, as somebody starts it by hand: a boot, a boot with cloud-init, a restore."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from benchmarks.cpu import cpu_seconds
from benchmarks.machine import accelerator
from host_agent import exchange
from host_agent.hypervisors.images import Image
from host_agent.hypervisors.qemu_options import HOST_LINE, KVM, MACHINE, QEMU, QEMU_IMG, RAM, TCG
from host_agent.hypervisors.virtualbox.config_iso import iso9660

DEADLINE = 600.0
# The driver's VMs run at this priority too.
NICE = ("nice", "-n", "19")
DONE = "cloud-init-has-run"
IGNORE = "x-ignore-shared"  # memory is not in the state, but a file of its own


def overlay(disk: Path, over: Path) -> Path:
    """A disk of its own over another, which stays as it is."""
    disk.unlink(missing_ok=True)
    argv = [QEMU_IMG, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(over), str(disk)]
    subprocess.run(argv, check=True)
    return disk


def plain_boot(image: Image, folder: Path) -> float:
    """Seconds until the guest's agent waits for its settings: kernel, init, Python, agent, and no host agent."""
    line = folder / "host.sock"
    disk = overlay(folder / "plain.qcow2", image.disk)
    more = ["-chardev", f"socket,id=host,path={line},server=off", "-device", "virtio-serial-pci"]
    more += ["-device", f"virtserialport,chardev=host,name={HOST_LINE}"]
    with _listening(line) as server, _started(_argv(image, disk, *more)) as qemu, _accept(server) as guest:
        _read_until(guest.fileno(), b'{"waiting": true}')
        return qemu.seconds()


def cloud_init_boot(image: Image, folder: Path) -> float:
    """Seconds until cloud-init has run a user's script, in an image with systemd."""
    disk = overlay(folder / "cloud.qcow2", image.disk)
    script = f"#!/bin/sh\necho {DONE} >/dev/ttyS0\n"
    drive = folder / "cidata.iso"
    meta = f"instance-id: i-{time.time_ns()}\nlocal-hostname: bench\n"
    drive.write_bytes(iso9660("cidata", {"META-DATA": meta.encode(), "USER-DATA": script.encode()}))
    more = ["-drive", f"file={drive},if=none,id=context,format=raw,readonly=on"]
    with _started(_argv(image, disk, *more, "-device", "virtio-blk-pci,drive=context")) as qemu:
        assert qemu.process.stdout is not None
        _read_until(qemu.process.stdout.fileno(), DONE.encode())
        return qemu.seconds()


def incoming(like: Sequence[str], disk: Path, state: Path, folder: Path) -> tuple[float, float]:
    """Until a guest runs on from a template, with the command line of a VM like it, by QEMU alone.

    Seconds, and the CPU time that QEMU has used by then.
    """
    with _come(like, disk, state, folder) as (qemu, monitor):
        monitor.ask("cont")  # it stood still when it was kept
        return qemu.seconds(), cpu_seconds([qemu.process.pid])


def whole_state(like: Sequence[str], disk: Path, state: Path, folder: Path) -> Path:
    """Of a template whose memory is a file of its own: the state as QEMU alone writes it, with the memory in it."""
    whole = folder / "whole"
    with _come(like, disk, state, folder) as (_, monitor):
        monitor.ask("migrate-set-capabilities", capabilities=[{"capability": IGNORE, "state": False}])
        monitor.ask("migrate-set-parameters", **{"max-bandwidth": 10 << 30})
        monitor.ask("migrate", uri=f"exec:cat >{whole}")
        until = time.monotonic() + DEADLINE
        while (status := monitor.ask("query-migrate").get("status")) != "completed":
            if status == "failed" or time.monotonic() > until:
                raise RuntimeError(f"QEMU did not write the whole state: {status}")
            time.sleep(0.02)
    return whole


def without_memory_file(like: Sequence[str]) -> list[str]:
    """The command line of a VM whose memory is no file."""
    argv = list(like)
    if "-object" in argv:
        del argv[argv.index("-object") : argv.index("-object") + 2]
    return [word.replace(f",memory-backend={RAM}", "") for word in argv]


@contextmanager
def _come(like: Sequence[str], disk: Path, state: Path, folder: Path) -> Iterator[tuple[_Running, _Monitor]]:
    """A QEMU that has read a state, and stands still."""
    place = Path(_after(like, "socket,id=monitor,path=").partition(",")[0]).parent
    theirs = _after(like, "if=none,id=disk,").partition("file=")[2]
    ours = str(overlay(folder / "incoming.qcow2", disk))
    exchange.make(folder / exchange.NAME)  # which some have, beside their disk
    places = {theirs: ours, str(Path(theirs).parent): str(folder), str(place): str(folder)}
    argv = list(like)
    for old, new in places.items():
        argv = [word.replace(old, new) for word in argv]
    argv = argv[: argv.index("-incoming")]
    has_memory = "-object" in argv
    with (
        state.open("rb") as file,
        _listening(folder / "qmp.sock") as server,
        _listening(folder / "host.sock"),
        _started([*argv, "-incoming", "defer"], file.fileno()) as qemu,
        _accept(server) as connection,
    ):
        monitor = _Monitor(connection, connection.makefile("rb"))
        monitor.ask("qmp_capabilities")
        monitor.ask("migrate-set-capabilities", capabilities=[{"capability": IGNORE, "state": has_memory}])
        monitor.ask("migrate-incoming", uri=f"fd:{file.fileno()}")
        while monitor.ask("query-status")["status"] == "inmigrate":
            time.sleep(0.002)
        yield qemu, monitor


def _argv(image: Image, disk: Path, *more: str) -> list[str]:
    how = KVM if accelerator() == "KVM" else TCG
    argv = [QEMU, *how, "-M", MACHINE, "-smp", "1", "-m", str(image.memory_mb), "-nodefaults", "-no-reboot"]
    argv += ["-display", "none", "-serial", "stdio", "-kernel", str(image.kernel), "-append", image.cmdline]
    argv += ["-initrd", str(image.initrd), "-drive", f"if=none,id=disk,format=qcow2,file={disk}"]
    argv += ["-device", "virtio-blk-pci,drive=disk", "-netdev", "user,id=net,restrict=on"]
    return [*argv, "-device", "virtio-net-pci,netdev=net,romfile=", "-device", "virtio-rng-pci", *more]


@attrs.frozen
class _Running:
    process: subprocess.Popen[bytes]
    began: float

    def seconds(self) -> float:
        return time.perf_counter() - self.began


@contextmanager
def _started(argv: Sequence[str], *descriptors: int) -> Iterator[_Running]:
    """QEMU, until it is killed here; its console is its output."""
    began = time.perf_counter()
    console = subprocess.DEVNULL if descriptors else subprocess.PIPE
    process = subprocess.Popen([*NICE, *argv], stdin=subprocess.DEVNULL, stdout=console, pass_fds=descriptors)
    try:
        yield _Running(process, began)
    finally:
        process.kill()
        process.wait(DEADLINE)


@contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        server.settimeout(DEADLINE)
        yield server


def _accept(server: socket.socket) -> socket.socket:
    connection, _ = server.accept()
    connection.settimeout(DEADLINE)
    return connection


def _read_until(descriptor: int, word: bytes) -> None:
    """Until the word has come; raises with the last of what came instead."""
    seen, until = b"", time.monotonic() + DEADLINE
    while word not in seen:
        ready = select.select([descriptor], [], [], max(0.0, until - time.monotonic()))[0]
        piece = os.read(descriptor, 65536) if ready else b""
        if not piece:
            raise RuntimeError(f"the guest did not say {word.decode()}: {seen[-500:].decode(errors='replace')}")
        seen = (seen + piece)[-8192:]


@attrs.frozen
class _Monitor:
    connection: socket.socket
    lines: Any

    def ask(self, command: str, **arguments: Any) -> Any:
        """A command of QMP; what it says besides the answer is passed over."""
        self.connection.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while "return" not in (said := json.loads(self.lines.readline())):
            if "error" in said:
                raise RuntimeError(f"{command}: {said['error']}")
        return said["return"]


def _after(argv: Sequence[str], begin: str) -> str:
    """The rest of the word that begins so."""
    return next(word.removeprefix(begin) for word in argv if word.startswith(begin))
