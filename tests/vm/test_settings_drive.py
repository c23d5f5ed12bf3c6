"""A running guest is given a drive with its settings, then another: it takes the first and notices the second."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from host_agent.hypervisors.images import Image
from host_agent.hypervisors.virtualbox.config_iso import iso9660

pytestmark = pytest.mark.vm
DEADLINE = 400.0  # seconds for an emulated start from the disk, on a loaded host


class Machine:
    """QEMU with an empty CD drive and nothing else that could hold settings."""

    def __init__(self, image: Image, place: Path) -> None:
        disk, monitor = place / "disk.qcow2", place / "monitor"
        backing = ["-b", str(image.disk), "-F", "qcow2"]
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(disk)], check=True)
        argv = ["qemu-system-x86_64", "-M", "pc", "-m", "256", "-cpu", "max", "-nodefaults", "-display", "none"]
        argv += ["-no-reboot", "-serial", "stdio", "-device", "VGA,vgamem_mb=4", "-device", "virtio-rng-pci"]
        argv += ["-drive", f"if=none,id=disk,file={disk}", "-device", "virtio-blk-pci,drive=disk"]
        argv += ["-device", "ide-cd,id=cd", "-qmp", f"unix:{monitor},server=on,wait=off"]
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self._said = b""
        self._monitor = socket.socket(socket.AF_UNIX)
        while not monitor.exists():
            assert self.process.poll() is None
            time.sleep(0.05)
        self._monitor.connect(str(monitor))
        self._answers = self._monitor.makefile("rb")
        self._ask("qmp_capabilities")

    def _ask(self, command: str, **arguments: object) -> None:
        self._monitor.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        for line in self._answers:
            answer = json.loads(line)
            assert "error" not in answer, answer
            if "return" in answer:
                return

    def insert(self, drive: Path) -> None:
        self._ask("blockdev-change-medium", id="cd", filename=str(drive), format="raw", force=True)

    def wait_for(self, words: bytes) -> None:
        """Until the console has said this, after what was waited for before."""
        assert self.process.stdout is not None
        until = time.monotonic() + DEADLINE
        while words not in self._said:
            ready, _, _ = select.select([self.process.stdout], [], [], until - time.monotonic())
            assert ready, f"{words!r} was not said in {DEADLINE} s: {self._said[-2000:]!r}"
            data = os.read(self.process.stdout.fileno(), 65536)
            assert data, self._said[-2000:]
            self._said += data
        self._said = self._said.partition(words)[2]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._answers.close()
        self._monitor.close()


@pytest.fixture
def machine(image: Image, tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(image, tmp_path)
    yield machine
    machine.end()


def drive(place: Path, port: int) -> Path:
    """One with the settings of a guest whose broker is on that port, where nobody listens."""
    broker = {"host": "127.0.0.1", "port": port}
    value = {"format": 2, "guest": "g", "host": "h", "name": "n", "brokers": [broker], "login": "g", "passcode": "p",
             "files": "http://127.0.0.1:1/", "secret": "s", "dialect": "stomp", "proxy": ""}  # fmt: skip
    path = place / f"{port}.iso"
    path.write_bytes(iso9660("SETTINGS", {"CONFIG.JSON": json.dumps(value).encode()}))
    return path


def test_settings_come_to_a_running_guest_and_change(machine: Machine, tmp_path: Path) -> None:
    machine.wait_for(b"start: no settings yet")
    machine.insert(drive(tmp_path, 1))
    machine.wait_for(b"the broker at 127.0.0.1:1 cannot be reached")
    machine.insert(drive(tmp_path, 2))
    machine.wait_for(b"the settings have changed")
    machine.wait_for(b"the broker at 127.0.0.1:2 cannot be reached")
