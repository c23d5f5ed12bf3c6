"""The driver over fakes of VirtualBox's interface as 6.1, 7.0 and 7.2 have it: the contract, and what goes wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet import reactor

from host_agent.hypervisors.base import Hypervisor
from host_agent.hypervisors.images import Image
from host_agent.hypervisors.virtualbox.driver import VirtualBoxHypervisor
from tests.contract.hypervisor_contract import HypervisorContract

FAKE = Path(__file__).parent / "fake"


def environment(version: str, **more: str) -> dict[str, str]:
    return {**os.environ, "VBOX_SDK_PATH": str(FAKE), "PYTHONPATH": str(FAKE), "FAKE_VIRTUALBOX": version, **more}


def bootable_image(directory: Path) -> Image:
    disk = directory / "disk.vdi"
    disk.write_bytes(b"disk")
    return Image("fake", directory, "0" * 64, "x86_64", disk, None, None, "", 256)


class FakeContract(HypervisorContract):
    VERSION = ""

    @pytest.fixture(autouse=True)
    def _driver(self) -> Iterator[None]:
        self.driver = VirtualBoxHypervisor(reactor, environment(self.VERSION))
        yield
        pytest_twisted.blockon(self.driver.close())

    def hypervisor(self) -> Hypervisor:
        return self.driver

    def image(self, request: pytest.FixtureRequest) -> Image:
        return bootable_image(request.getfixturevalue("tmp_path"))


class Test61(FakeContract):
    VERSION = "6.1"


class Test70(FakeContract):
    VERSION = "7.0"


class Test72(FakeContract):
    VERSION = "7.2"
