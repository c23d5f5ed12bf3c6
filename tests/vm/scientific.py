"""`make test-scientific`: the recipe debian-scientific with a package and a file more, and a job in it that uses all.

Minutes where VMs are emulated, so not part of CI.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.agent_process import agent_process
from vm_images.builder import build_image
from vm_images.cache import Cache, default_cache
from vm_images.recipe import extended, load_recipe

pytestmark = pytest.mark.vm
DEADLINE = 1200.0  # seconds, emulated on a loaded host

JOB = """\
import subprocess, time
before = time.monotonic()
import numpy, scipy.linalg
print("imported in %.1f s" % (time.monotonic() - before))
assert numpy.allclose(scipy.linalg.inv(numpy.eye(3) * 2), numpy.eye(3) / 2)
assert subprocess.run(["bc"], input=b"2+3\\n", capture_output=True, check=True).stdout == b"5\\n"
assert open("/srv/data").read() == "data"
"""


def test_a_job_with_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").write_text("data")
    recipe = extended(load_recipe("debian-scientific"), ["bc"], [f"{tmp_path}/data:/srv/data"])
    image = build_image(recipe, tmp_path / "images", Cache(default_cache()), progress=print)
    print({path.name: path.stat().st_size for path in image.directory.iterdir()})
    monkeypatch.setenv("VMWRAPPER_IMAGES", str(image.directory.parent))
    with agent_process(tmp_path, hypervisor="qemu") as agent:
        assert agent.client is not None
        arguments = {"vm": "sci", "image": image.name, "directory": str(tmp_path / "vms"), "deadline_s": DEADLINE}
        agent.client.call("start_vm", arguments, deadline_s=DEADLINE)
        output = tmp_path / "output"
        request = {"vm": "sci", "argv": ["python3", "-c", JOB], "stdout": str(output)}
        ended = agent.client.call("run", request, deadline_s=DEADLINE)
        assert ended["exit_code"] == 0, ended
        print(output.read_text())
