"""The agent in a Debian that was made without it: cloud-init reads our drive, and the agent makes itself a service."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.system.agent_process import agent_process
from vm_images.agent_file import make_agent_file
from vm_images.builder import build_image
from vm_images.cache import Cache, default_cache
from vm_images.context import context_iso
from vm_images.recipe import load_recipe

pytestmark = pytest.mark.vm
RECIPES = Path(__file__).parent / "recipes"
DEADLINE = 400.0  # seconds for systemd and cloud-init in an emulated machine, on a loaded host

# What init started leads a session; the keeper and the child of root do not.
KILL = "kill -9 $(ps -eo pid=,sid=,comm= | awk '$1 == $2 && $3 ~ /^python/ {print $1}')"


def with_drive(folder: Path, drive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every QEMU that is started here gets the drive too."""
    real = shutil.which("qemu-system-x86_64")
    wrapper = folder / "bin" / "qemu-system-x86_64"
    wrapper.parent.mkdir()
    options = f"-drive file={drive},if=none,id=context,format=raw,readonly=on -device virtio-blk-pci,drive=context"
    wrapper.write_text(f'#!/bin/sh\nexec {real} "$@" {options}\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")


def test_cloud_init_installs_the_agent_under_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(default_cache())
    image = build_image(load_recipe(str(RECIPES / "cloud.toml")), tmp_path / "images", cache)
    drive = tmp_path / "context.iso"
    # The identity comes by itself: the agent finds no settings on this drive and takes those of the next place.
    drive.write_bytes(context_iso(make_agent_file(tmp_path / "agent.pyz", cache), None))
    with_drive(tmp_path, drive, monkeypatch)
    monkeypatch.setenv("VMWRAPPER_IMAGES", str(image.directory.parent))
    with agent_process(tmp_path, hypervisor="qemu") as agent:
        assert agent.client is not None
        folder = str(tmp_path / "vms")
        arguments = {"vm": "cloud", "image": "test-cloud", "directory": folder, "deadline_s": DEADLINE}
        agent.client.call("start_vm", arguments, deadline_s=DEADLINE)
        script = "test $(id -un) = vmwrapper && " + KILL
        ended = agent.client.call("run", {"vm": "cloud", "argv": ["sh", "-c", script]}, deadline_s=DEADLINE)
        # The agent that systemd starts in its place finds this command with the keeper, which outlived it.
        assert ended["exit_code"] == 0, ended
        ended = agent.client.call("run", {"vm": "cloud", "argv": ["sh", "-c", "exit 5"]}, deadline_s=DEADLINE)
        assert ended["exit_code"] == 5, ended
