"""The agent in a Debian that was made without it, whose process 1 is busybox: it makes itself a service."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.agent_process import agent_process
from vm_images.agent_file import make_agent_file
from vm_images.builder import build_image
from vm_images.cache import Cache, default_cache
from vm_images.recipe import load_recipe

pytestmark = pytest.mark.vm
RECIPES = Path(__file__).parent / "recipes"
DEADLINE = 400.0  # seconds for an emulated machine, on a loaded host

# What init started leads a session; the keeper and the child of root do not.
KILL = "kill -9 $(ps -eo pid=,sid=,comm= | awk '$1 == $2 && $3 ~ /^python/ {print $1}')"


TINY_RC = """\
#!/bin/sh
B=/usr/bin/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sys /sys
$B mount -t tmpfs run /run
$B ifconfig lo 127.0.0.1 up
$B ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
/usr/bin/python3 /root/agent.pyz --install
/usr/bin/python3 /root/agent.pyz --install
"""


def test_the_agent_installs_itself_under_a_tiny_init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 1 is busybox; its inittab has no line for us until the agent has installed itself, twice here."""
    cache = Cache(default_cache())
    make_agent_file(tmp_path / "agent.pyz", cache)
    (tmp_path / "rcS").write_text(TINY_RC)
    (tmp_path / "rcS").chmod(0o755)
    (tmp_path / "inittab").write_text("::sysinit:/etc/init.d/rcS\n")
    (tmp_path / "init").symlink_to("/usr/bin/busybox")
    files = ["agent.pyz:/root/agent.pyz", "rcS:/etc/init.d/rcS", "inittab:/etc/inittab", "init:/sbin/init"]
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(f'name = "test-tiny"\nextends = "{RECIPES}/foreign.toml"\nfiles = {files!r}\n')
    image = build_image(load_recipe(str(recipe)), tmp_path / "images", cache)
    monkeypatch.setenv("VMWRAPPER_IMAGES", str(image.directory.parent))
    with agent_process(tmp_path, hypervisor="qemu") as agent:
        assert agent.client is not None
        folder = str(tmp_path / "vms")
        arguments = {"vm": "tiny", "image": "test-tiny", "directory": folder, "deadline_s": DEADLINE}
        agent.client.call("start_vm", arguments, deadline_s=DEADLINE)
        script = "test $(grep -c vmwrapper-guest-agent/start.py /etc/inittab) = 1 && " + KILL
        ended = agent.client.call("run", {"vm": "tiny", "argv": ["sh", "-c", script]}, deadline_s=DEADLINE)
        assert ended["exit_code"] == 0, ended
        ended = agent.client.call("run", {"vm": "tiny", "argv": ["sh", "-c", "exit 5"]}, deadline_s=DEADLINE)
        assert ended["exit_code"] == 5, ended
