"""The XML-RPC interface with a real VM: what a guest without virtual hardware cannot show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xmlrpc.client import ServerProxy

import pytest

from host_agent.hypervisors.images import Image
from tests.system.agent_process import agent_process
from tests.system.test_xmlrpc import finished

pytestmark = pytest.mark.vm


def test_a_machine_and_its_states(tmp_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMWRAPPER_IMAGES", str(image.directory.parent))
    with agent_process(tmp_path, "--xmlrpc", "127.0.0.1:0", hypervisor="qemu") as agent:
        match = re.search(r"XML-RPC on port (\d+)", (tmp_path / "agent.log").read_text())
        assert match is not None
        with ServerProxy(f"http://127.0.0.1:{match[1]}/RPC2") as controller:
            steps(controller, image)
        assert agent.left_over() == []


def steps(controller: Any, image: Image) -> None:
    assert controller.listAvailableVMs() == [image.name]
    # As the path of a file of the image: then, it was a hard disk's.
    assert controller.createVM("CernVM", str(image.disk)) == [True, "CernVM"]
    assert controller.start("CernVM") is True

    assert controller.saveSnapshot("CernVM", "the first one", "with a description") is True
    finished(controller, controller.runCmd("CernVM", "touch", ["later"]))
    assert controller.restoreSnapshot("CernVM") is True
    results = finished(controller, controller.runCmd("CernVM", "ls", ["later"]))
    assert results["exitCodeOrSignal"] == 2

    finished(controller, controller.runCmd("CernVM", "touch", ["kept"]))
    assert controller.saveState("CernVM") is True
    assert controller.getState("CernVM") == "Saved"
    assert controller.start("CernVM") is True
    assert controller.getState("CernVM") == "Running"
    assert finished(controller, controller.runCmd("CernVM", "ls", ["kept"]))["out"] == "kept\n"

    assert controller.powerOff("CernVM") is True
    assert controller.getState("CernVM") == "PoweredOff"
