"""The driver over a real VirtualBox: the contract, the whole life of a VM, and what a crash leaves."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as _reactor

from host_agent.hypervisors.base import Hypervisor
from host_agent.hypervisors.images import Image
from host_agent.hypervisors.virtualbox.driver import VirtualBoxHypervisor
from tests.contract.hypervisor_contract import HypervisorContract

from . import guest

reactor: Any = _reactor


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """An image whose guest prints letters."""
    # Interpreted where there is no kernel driver; where there is one, it makes no difference.
    asked = ["VBoxManage", "setextradata", "global", "VBoxInternal/HM/FallbackToIEM", "1"]
    subprocess.run(asked, check=True, capture_output=True, timeout=60)
    return guest.image(tmp_path_factory.mktemp("tiny") / "image")


class TestVirtualBox(HypervisorContract):
    @pytest.fixture(autouse=True)
    def _driver(self) -> Iterator[None]:
        self.driver = VirtualBoxHypervisor(reactor)
        yield
        pytest_twisted.blockon(self.driver.close())

    def hypervisor(self) -> Hypervisor:
        return self.driver

    def image(self, request: pytest.FixtureRequest) -> Image:
        found: Image = request.getfixturevalue("tiny")
        return found
