"""What a guest reaches over VirtualBox's NAT as we set it: its service ports, this host's loopback, and nothing else.

The guest is iPXE, which an interpreted processor starts in half a minute.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from pytest_twisted import ensureDeferred
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.web.resource import Resource
from twisted.web.server import Request, Site

from host_agent.hypervisors import loopback_ports
from host_agent.hypervisors.base import MachineSpec
from host_agent.hypervisors.virtualbox.driver import VirtualBoxHypervisor
from tests.contract.hypervisor_contract import Told

from . import guest

reactor: Any = _reactor
GUEST_DEADLINE = 240.0  # seconds for iPXE to start and try everything
SERVICE = 61613


class Asked(Resource):
    """Answers with a script of iPXE, and remembers what it was asked for."""

    isLeaf = True

    def __init__(self, script: str = "") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.script = script
        self.paths: list[str] = []
        self.ended: Deferred[None] = Deferred()

    def render_GET(self, request: Request) -> bytes:
        path = (request.path or b"").decode()
        self.paths.append(path)
        if path == "/end":
            self.ended.callback(None)
        return self.script.encode()


@pytest.fixture
def driver() -> Iterator[VirtualBoxHypervisor]:
    made = VirtualBoxHypervisor(reactor)
    yield made
    pytest_twisted.blockon(made.close())


HERE, OTHER = "192.0.2.1", "192.0.2.2"  # a documentation network: nobody's


@pytest.fixture
def another_host(tmp_path: Path) -> Iterator[Path]:
    """A second host on a network of this test run's own name space, with a web server; yields its log."""
    for words in (
        ["netns", "add", "another"],
        ["link", "add", "outside", "type", "veth", "peer", "name", "inside", "netns", "another"],
        ["address", "add", f"{HERE}/24", "dev", "outside"],
        ["link", "set", "outside", "up"],
        ["-n", "another", "address", "add", f"{OTHER}/24", "dev", "inside"],
        ["-n", "another", "link", "set", "inside", "up"],
    ):
        subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)
    log = tmp_path / "another-host.log"
    argv = ["ip", "netns", "exec", "another", sys.executable, "-u", "-m", "http.server", "80", "--bind", OTHER]
    with log.open("wb") as file, subprocess.Popen(argv, cwd=tmp_path, stdout=file, stderr=file) as server:
        yield log
        server.terminate()
    subprocess.run(["ip", "netns", "del", "another"], check=True, timeout=30)


def fetched(url: str) -> bool:
    """Does this host itself reach it? Tried for as long as its server may need to start."""
    for _ in range(100):
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310 - a constant http address
                return True
        except OSError:
            time.sleep(0.1)
    return False


@ensureDeferred
async def test_guest_reaches_its_service_and_no_network(
    driver: VirtualBoxHypervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, another_host: Path
) -> None:
    own = Asked()
    # The guest's command is in its image, which is there before the driver listens: for once the port is chosen here.
    with socket.create_server(("127.0.0.1", 0)) as probe:
        place = probe.getsockname()[1]
    monkeypatch.setattr(loopback_ports, "FREE", place)
    own.script = f"""#!ipxe
imgfetch --timeout 5000 http://{OTHER}/of-the-guest ||
imgfetch http://10.0.2.2:{place}/end ||
"""
    image = guest.network_image(tmp_path / "image", f"dhcp && chain http://10.0.2.2:{place}/begin || shell")
    directory = tmp_path / "vm"
    directory.mkdir(mode=0o700)
    spec = MachineSpec("net", "t-network", image, directory, 64, 1, {SERVICE: Site(own)}, b"{}", Told())
    machine = await driver.create(spec)
    try:
        assert fetched(f"http://{OTHER}/")
        await machine.start()
        await own.ended.addTimeout(GUEST_DEADLINE, reactor)
        assert own.paths == ["/begin", "/end"]
        log = another_host.read_text()
        assert "GET / " in log
        assert "of-the-guest" not in log
    finally:
        await machine.destroy()
