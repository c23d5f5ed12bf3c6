"""A guest image with our agent and, beside it as root, what others run commands with: sshd and qemu-guest-agent."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import attrs

from host_agent.hypervisors.images import Image
from vm_images.builder import build_image
from vm_images.cache import Cache, default_cache
from vm_images.recipe import load_recipe
from vm_images.rootfs import SOURCES

NAME = "bench-peers"
PACKAGES = ("openssh-server", "qemu-guest-agent")

# In the place of what starts our agent as root: it starts the others, and then does what it always does.
_START = """\
import os

from . import plainly_privileged

SSHD = ("/usr/sbin/sshd", "-D", "-o", "UsePAM=no", "-o", "UseDNS=no", "-o", "MaxSessions=64", "-o", "MaxStartups=100")
PORTS = "/sys/class/virtio-ports"


def main(root):
    if os.getuid() == 0:
        os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
        os.posix_spawn(SSHD[0], SSHD, os.environ)
        for name in os.listdir(PORTS):
            with open(f"{PORTS}/{name}/name") as file:
                if file.read().strip() == "org.qemu.guest_agent.0":
                    argv = ("/usr/sbin/qemu-ga", "-m", "virtio-serial", "-p", f"/dev/{name}")
                    os.posix_spawn(argv[0], argv, os.environ)
    return plainly_privileged.main(root)
"""


def peers_image(output: Path) -> Image:
    """Build it, or take it from the cache; a minute or two when it is new."""
    recipe = load_recipe("debian-minimal")
    recipe = attrs.evolve(recipe, name=NAME, packages=(*recipe.packages, *PACKAGES))
    with tempfile.TemporaryDirectory(prefix="vmwrapper-bench-") as folder:
        sources = Path(folder)
        for package in ("common", "guest_agent"):
            shutil.copytree(SOURCES / package, sources / package, ignore=shutil.ignore_patterns("__pycache__"))
        agent = sources / "guest_agent"
        (agent / "privileged.py").rename(agent / "plainly_privileged.py")
        (agent / "privileged.py").write_text(_START)
        return build_image(recipe, output, Cache(default_cache()), sources=sources)
