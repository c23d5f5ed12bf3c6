"""The agent in Debians that were made without it makes itself a service: from cloud-init's drive under systemd, and by
hand where process 1 is busybox."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.system.agent_process import AgentProcess, agent_process
from vm_images.agent_file import make_agent_file
from vm_images.builder import build_image
from vm_images.cache import Cache, default_cache
from vm_images.context import context_iso
from vm_images.debian import debian_key
from vm_images.recipe import load_recipe
from vm_images.sources import debian_sources

from .ordinary_user import give, python, take_sources

pytestmark = pytest.mark.vm
RECIPES = Path(__file__).parent / "recipes"
CLOUD = RECIPES / "cloud.toml"
DEADLINE = 900.0  # seconds for an emulated machine; systemd and cloud-init take more than one on a quiet host

# What init started leads a session; the keeper and the child of root do not.
KILL = "kill -9 $(ps -eo pid=,sid=,comm= | awk '$1 == $2 && $3 ~ /^python/ {print $1}')"


# Makes the recipe's Debian in the cache: both are named by the command line.
_DEBIAN = """
import sys
from pathlib import Path
from vm_images.cache import Cache
from vm_images.debian import debian_layer
from vm_images.recipe import load_recipe
from vm_images.sources import debian_sources
print(debian_layer(Cache(Path(sys.argv[2])), load_recipe(sys.argv[1]))[1])
"""


def debian_without_root(cache: Cache) -> None:
    """Where the cache has not got it yet, these tests' Debian is made by an ordinary user, as all else is by root."""
    recipe = load_recipe(str(CLOUD))

    def make(layer: Path) -> None:
        place = Path(tempfile.mkdtemp(prefix="vmwrapper-user-"))  # pytest's own directories are root's alone
        try:
            take_sources(place)
            shutil.copytree(RECIPES, place / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
            give(place)
            done = python(place, _DEBIAN, str(place / "recipes" / CLOUD.name), str(place / "cache"))
            assert done.returncode == 0, done.stderr
            for file in Path(done.stdout.strip()).iterdir():
                shutil.copyfile(file, layer / file.name)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    cache.layer("debian", debian_key(recipe, debian_sources(recipe.release)), make)


def with_drive(folder: Path, drive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every QEMU that is started here gets the drive too."""
    real = shutil.which("qemu-system-x86_64")
    wrapper = folder / "bin" / "qemu-system-x86_64"
    wrapper.parent.mkdir()
    options = f"-drive file={drive},if=none,id=context,format=raw,readonly=on -device virtio-blk-pci,drive=context"
    wrapper.write_text(f'#!/bin/sh\nexec {real} "$@" {options}\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")


def start(agent: AgentProcess, image: str) -> None:
    assert agent.client is not None
    arguments = {"vm": "it", "image": image, "directory": str(agent.folder / "vms"), "deadline_s": DEADLINE}
    agent.client.call("start_vm", arguments, deadline_s=DEADLINE)


def run(agent: AgentProcess, script: str) -> object:
    """What the script ends with in the guest."""
    assert agent.client is not None
    return agent.client.call("run", {"vm": "it", "argv": ["sh", "-c", script]}, deadline_s=DEADLINE)["exit_code"]


def test_cloud_init_installs_the_agent_under_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(default_cache())
    debian_without_root(cache)
    image = build_image(load_recipe(str(CLOUD)), tmp_path / "images", cache)
    drive = tmp_path / "context.iso"
    # The identity comes by itself: the agent finds no settings on this drive and takes those of the next place.
    drive.write_bytes(context_iso(make_agent_file(tmp_path / "agent.pyz", cache), None))
    with_drive(tmp_path, drive, monkeypatch)
    monkeypatch.setenv("VMWRAPPER_IMAGES", str(image.directory.parent))
    with agent_process(tmp_path, hypervisor="qemu") as agent:
        start(agent, image.name)
        assert run(agent, 'test "$(cat /proc/1/comm)" = systemd && test $(id -un) = vmwrapper && ' + KILL) == 0
        # The agent that systemd starts in its place finds this command with the keeper, which outlived it.
        assert run(agent, "exit 5") == 5
        # What cloud-init's last stage ran from the drive said this on the console.
        (console,) = tmp_path.glob("vms/vm-it-*/console.log")
        assert re.search(rb"cloud-init\[\d+\]: vmwrapper-guest-agent: installed \(systemd\)", console.read_bytes())


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
    debian_without_root(cache)
    make_agent_file(tmp_path / "agent.pyz", cache)
    (tmp_path / "rcS").write_text(TINY_RC)
    (tmp_path / "rcS").chmod(0o755)
    (tmp_path / "inittab").write_text("::sysinit:/etc/init.d/rcS\n")
    (tmp_path / "init").symlink_to("/usr/bin/busybox")
    files = ["agent.pyz:/root/agent.pyz", "rcS:/etc/init.d/rcS", "inittab:/etc/inittab", "init:/sbin/init"]
    recipe = tmp_path / "tiny.toml"
    # The same Debian as above: another would have to be made, and what it has more is never started.
    recipe.write_text(f'name = "test-tiny"\nextends = "{CLOUD}"\nfiles = {files!r}\n')
    image = build_image(load_recipe(str(recipe)), tmp_path / "images", cache)
    monkeypatch.setenv("VMWRAPPER_IMAGES", str(image.directory.parent))
    with agent_process(tmp_path, hypervisor="qemu") as agent:
        start(agent, image.name)
        proof = 'test "$(cat /proc/1/comm)" = init && '
        assert run(agent, proof + "test $(grep -c vmwrapper-guest-agent/start.py /etc/inittab) = 1 && " + KILL) == 0
        assert run(agent, "exit 5") == 5
