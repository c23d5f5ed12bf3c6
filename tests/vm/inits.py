"""`make test-inits`: the agent makes itself a service of Debian's System V init and OpenRC, which start it again.

One of the machines gets the frozen agent, with a Python of its own. Minutes where VMs are emulated, so not part of CI.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.agent_process import agent_process
from vm_images.agent_file import make_agent_file
from vm_images.builder import build_image, frozen_agent
from vm_images.cache import Cache, default_cache
from vm_images.frozen import write_frozen
from vm_images.recipe import load_recipe

from .test_install import RECIPES

pytestmark = pytest.mark.vm
DEADLINE = 1200.0  # seconds for all of a distribution's services in an emulated machine, on a loaded host

# Debian's initscripts run this when all services have been started.
RC_LOCAL = """\
#!/bin/sh
busybox ifconfig lo 127.0.0.1 up
busybox ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
{unpack}
{install}
{install}
"""
FORMS = {
    "agent.pyz": ("", "/usr/bin/python3 /root/agent.pyz --install"),
    "agent.tar.gz": ("tar -xzf /root/agent.tar.gz -C /root", "/root/vmwrapper-guest-agent/launch --install"),
}


@pytest.mark.parametrize(
    ("kind", "packages", "form", "proof"),
    [
        ("sysv", ["sysvinit-core", "initscripts"], "agent.tar.gz", "test $(grep -c '^vmw:' /etc/inittab) = 1"),
        ("openrc", ["sysvinit-core", "initscripts", "openrc"], "agent.pyz", "pidof supervise-daemon"),
    ],
)
def test_the_agent_makes_itself_a_service(
    kind: str, packages: list[str], form: str, proof: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(default_cache())
    if form == "agent.pyz":
        make_agent_file(tmp_path / form, cache)
    else:
        write_frozen(tmp_path / form, frozen_agent(cache))
    unpack, install = FORMS[form]
    (tmp_path / "rc.local").write_text(RC_LOCAL.format(unpack=unpack, install=install))
    (tmp_path / "rc.local").chmod(0o755)
    recipe = tmp_path / "recipe.toml"
    files = [f"{form}:/root/{form}", "rc.local:/etc/rc.local"]
    words = f'name = "test-{kind}"\nextends = "{RECIPES}/foreign.toml"\npackages = {packages!r}\nfiles = {files!r}\n'
    recipe.write_text(words)
    image = build_image(load_recipe(str(recipe)), tmp_path / "images", cache)
    monkeypatch.setenv("VMWRAPPER_IMAGES", str(image.directory.parent))
    with agent_process(tmp_path, hypervisor="qemu") as agent:
        assert agent.client is not None

        def run(script: str) -> int:
            assert agent.client is not None
            argv = ["sh", "-c", script]
            ended = agent.client.call("run", {"vm": kind, "argv": argv}, deadline_s=DEADLINE)
            code = ended["exit_code"]
            assert isinstance(code, int), ended
            return code

        arguments = {"vm": kind, "image": image.name, "directory": str(tmp_path / "vms"), "deadline_s": DEADLINE}
        agent.client.call("start_vm", arguments, deadline_s=DEADLINE)
        assert run(f'test "$(cat /proc/1/comm)" = init && test "$(id -un)" = vmwrapper && {proof}') == 0
        # The agent is the process that has the keeper's socket as a client: the oldest of ours that is not root's.
        assert run("kill -9 $(pgrep -o -u vmwrapper -f vmwrapper-guest-agent/start.py)") == 0
        assert run("exit 5") == 5
