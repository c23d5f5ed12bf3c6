"""A guest without drive, `fw_cfg` or line to its host finds its settings all the same, says hello and does its work."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from guest_agent.discovery import GATEWAY_PATH
from host_agent.hypervisors.images import Image
from tests.system.agent_process import DEADLINE, AgentProcess, agent_process

from . import without_settings

pytestmark = pytest.mark.vm
ROOT = Path(__file__).resolve().parents[2]
NO_OTHER_PLACE = "test ! -e /sys/firmware/qemu_fw_cfg/by_name/opt/vmwrapper && test ! -e /dev/sr0"
PROXY = "http://192.168.76.77:1"


@contextmanager
def guest(folder: Path, image: Image, how: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[AgentProcess]:
    """A host agent whose VM gets its settings as `without_settings.py` says; it has not said hello yet."""
    real = shutil.which("qemu-system-x86_64")
    alone = "" if how == "cmdline" else f"unshare --net {'' if os.getuid() == 0 else '--map-root-user'}"
    wrapper = folder / "bin" / "qemu-system-x86_64"
    wrapper.parent.mkdir()
    python = f"env PYTHONPATH={ROOT} {sys.executable} {without_settings.__file__}"
    wrapper.write_text(f'#!/bin/sh\nexec {alone} {python} {real} {how} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("VMWRAPPER_WARM_START", "0")
    with agent_process(folder, hypervisor="qemu") as agent:
        yield agent


def start(agent: AgentProcess, image: Image) -> None:
    """The VM, until its agent has said hello."""
    agent.call("start_vm", vm="it", image=str(image.directory), directory=str(agent.folder / "vms"))


def run(agent: AgentProcess, script: str) -> object:
    """What the script ends with in the guest."""
    return agent.call("run", vm="it", argv=["sh", "-c", script])["exit_code"]


def test_settings_on_the_kernel_command_line(image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with guest(tmp_path, image, "cmdline", monkeypatch) as agent:
        start(agent, image)
        assert run(agent, f"{NO_OTHER_PLACE} && grep -q vmwrapper.config= /proc/cmdline && exit 5") == 5


class Handler(BaseHTTPRequestHandler):
    server: Gateway

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        self.send_response(200 if len(self.server.paths) > 1 else 404)
        self.end_headers()
        self.wfile.write(json.dumps(self.server.settings).encode())

    def log_message(self, *_: object) -> None:
        pass


class Gateway(ThreadingHTTPServer):
    """The web server at the guest's gateway. It has `settings` for everybody but the first who asks."""

    def __init__(self) -> None:
        super().__init__(("", 0), Handler, bind_and_activate=False)
        self.settings: dict[str, object] = {}
        self.paths: list[str] = []

    def serve(self, waiting: socket.socket) -> None:
        """From QEMU's start on, which brings the settings and the port."""
        with waiting.accept()[0] as qemu:
            settings, (port,), _, _ = socket.recv_fds(qemu, 65536, 1)
        self.socket.close()
        self.socket = socket.socket(fileno=port)
        self.settings = json.loads(settings)
        self.serve_forever()


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    with Gateway() as gateway, socket.socket(socket.AF_UNIX) as waiting:
        waiting.bind(str(tmp_path / "gateway"))
        waiting.listen()
        waiting.settimeout(DEADLINE)
        threading.Thread(target=gateway.serve, args=[waiting], daemon=True).start()
        yield gateway
        if gateway.settings:
            gateway.shutdown()


def test_settings_at_the_gateway_that_dhcp_names(
    image: Image, gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a network that the guest does not expect. When they change it goes on with the new ones, as does a command."""
    with guest(tmp_path, image, str(tmp_path / "gateway"), monkeypatch) as agent:
        start(agent, image)
        given = "busybox ifconfig eth0 | grep -qF addr:192.168.76. && grep -q 192.168.76 /etc/resolv.conf"
        assert run(agent, f"{NO_OTHER_PLACE} && {given} && exit 5") == 5
        agent.begin("it", "c-goes-on", f"until grep -q {PROXY} /run/vmwrapper/config.json; do sleep 0.2; done; exit 6")
        gateway.settings = {**gateway.settings, "proxy": PROXY}
        assert agent.call("run", vm="it", command="c-goes-on", argv=["false"])["exit_code"] == 6
        while run(agent, f'test "$http_proxy" = {PROXY} && exit 7') != 7:
            pass  # this one went to the agent that has just read of new settings, and ends
        assert set(gateway.paths) == {GATEWAY_PATH}
