"""A guest image with our agent and, beside it as root, what others work with: sshd, qemu-guest-agent, a virtiofs.

Chirp's server comes into the image too, and is started by who measures it.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import attrs

from benchmarks.agent import VM, Agent
from common.errors import VMwrapperError
from host_agent.hypervisors.images import Image
from vm_images.builder import build_image
from vm_images.cache import Cache, default_cache
from vm_images.recipe import Recipe, load_recipe
from vm_images.rootfs import SOURCES

from .packages import Unavailable
from .ssh import Ssh, make_key

NAME, LEAN = "bench-peers", "bench-qemu-ga"
GUEST_AGENT = "qemu-guest-agent"
PACKAGES = ("openssh-server", GUEST_AGENT, "coop-computing-tools")
USER = "vmwrapper"  # that our agent and its programs run as
SSH_PORT = 22
SHARED = "/mnt/bench"  # where a virtiofs with the tag "bench" is

# In the place of what starts our agent as root: it starts the others, and then does what it always does.
_START = """\
import os
import subprocess

from . import plainly_privileged

SSHD = ("/usr/sbin/sshd", "-D", "-o", "UsePAM=no", "-o", "UseDNS=no", "-o", "MaxSessions=64", "-o", "MaxStartups=100")
PORTS = "/sys/class/virtio-ports"


def main(root):
    if os.getuid() == 0:
        if os.path.exists(SSHD[0]):
            os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
            os.posix_spawn(SSHD[0], SSHD, os.environ)
        for name in os.listdir(PORTS):
            with open(f"{PORTS}/{name}/name") as file:
                if file.read().strip() == "org.qemu.guest_agent.0":
                    argv = ("/usr/sbin/qemu-ga", "-m", "virtio-serial", "-p", f"/dev/{name}")
                    os.posix_spawn(argv[0], argv, os.environ)
        os.makedirs("/mnt/bench", exist_ok=True)
        # Where the machine has no such device this fails, and nobody misses it.
        argv = ["/usr/bin/busybox", "mount", "-t", "virtiofs", "bench", "/mnt/bench"]
        subprocess.run(argv, stderr=subprocess.DEVNULL, check=False)
    return plainly_privileged.main(root)
"""


def peers_image(output: Path) -> Image:
    """Build it, or take it from the cache; a minute or two when it is new."""
    recipe = load_recipe("debian-minimal")
    recipe = attrs.evolve(recipe, name=NAME, packages=(*recipe.packages, *PACKAGES))
    return _built(attrs.evolve(recipe, modules=(*recipe.modules, "virtiofs")), output)


def lean_image(output: Path) -> Image:
    """With qemu-guest-agent alone; half a minute when it is new. Raises Unavailable."""
    recipe = load_recipe("debian-minimal")
    try:
        return _built(attrs.evolve(recipe, name=LEAN, packages=(*recipe.packages, GUEST_AGENT)), output)
    except VMwrapperError as error:
        raise Unavailable(f"its image cannot be built: {error.explain()}") from None


def _built(recipe: Recipe, output: Path) -> Image:
    with tempfile.TemporaryDirectory(prefix="vmwrapper-bench-") as folder:
        sources = Path(folder)
        for package in ("common", "guest_agent"):
            shutil.copytree(SOURCES / package, sources / package, ignore=shutil.ignore_patterns("__pycache__"))
        agent = sources / "guest_agent"
        (agent / "privileged.py").rename(agent / "plainly_privileged.py")
        (agent / "privileged.py").write_text(_START)
        return build_image(recipe, output, Cache(default_cache()), sources=sources)


def let_in(agent: Agent, port: int, folder: Path) -> Ssh:
    """Bring a key of ours into the guest; the client for a connection that stays."""
    key = make_key(folder / "guest-key")
    place = folder / "dot-ssh"
    place.mkdir(mode=0o700)
    shutil.copyfile(f"{key}.pub", place / "authorized_keys")
    agent.call("put", vm=VM, source=str(place), destination=".ssh")
    return Ssh(port, key, USER, str(folder / "guest-ssh.sock"))
